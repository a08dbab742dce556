"""A recorded run replays to the same plans, and a changed one does not."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.scheduler.trace import TraceError, replay
from tests.scheduler.test_scheduler import cases, machines, spanned
from tests.scheduler.workload import Case, Machine, Run, run

TODO = [
    Case((1, 2, 3, 4, 5), 6, 0, n=2, tenant="a"),
    Case((1, 2, 3), 6, 1, priority=-1, abort_after=2),
    Case((1, 2, 3, 4), 9, 2, fail_at=2),
]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(cases, min_size=1, max_size=7), machines | spanned)
def test_a_replay_makes_the_same_plans(todo: list[Case], machine: Machine) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl"
        done = run(todo, machine, path)
        assert replay(path) >= len(done.device.plans)


@pytest.fixture
def lines(tmp_path: Path) -> list[str]:
    run(TODO, Machine(max_seqs=2, depth=2), tmp_path / "trace.jsonl")
    return (tmp_path / "trace.jsonl").read_text().splitlines(keepends=True)


def test_the_recorder_reports_what_the_scheduler_does(tmp_path: Path) -> None:
    done = Run(TODO, Machine(max_seqs=2), tmp_path / "trace.jsonl")
    for _ in done.steps():
        recorder, scheduler = done.recorder, done.scheduler
        assert recorder is not None and recorder.pool is scheduler.pool
        assert recorder.num_running == scheduler.num_running
        assert recorder.num_waiting == scheduler.num_waiting
        assert recorder.num_preemptions == scheduler.num_preemptions
        assert recorder.lookups == scheduler.lookups and recorder.num_parked == scheduler.num_parked
        assert recorder.batched_tokens == scheduler.batched_tokens


def test_a_different_plan_is_named(lines: list[str]) -> None:
    number = [i for i, line in enumerate(lines) if line.startswith('["plan"')][3]
    call, plan = json.loads(lines[number])
    plan[1][0][3] += 1
    changed = [*lines[:number], json.dumps([call, plan]) + "\n", *lines[number + 1 :]]
    with pytest.raises(TraceError, match=rf"line {number + 1}, step {plan[0]}: the trace has .* the replay"):
        replay(changed)


def test_different_results_give_different_plans(lines: list[str]) -> None:
    number = next(i for i, line in enumerate(lines) if line.startswith('["abort"'))
    with pytest.raises(TraceError, match="step"):
        replay(lines[:number] + lines[number + 1 :])


def test_a_torn_last_line_is_left_out(lines: list[str]) -> None:
    assert replay([*lines[:-1], lines[-1][:5]]) in (replay(lines), replay(lines) - 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line"),
        ('{"version":0}\n', "version 5"),
        ("[]\n", "first line"),
        ("{\n", "line 1 is not JSON"),
    ],
)
def test_what_is_no_trace_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "trace").write_text(text)
    with pytest.raises(TraceError, match=message):
        replay(tmp_path / "trace")


def test_unknown_calls_are_refused(lines: list[str]) -> None:
    with pytest.raises(TraceError, match="no call 'dance'"):
        replay([lines[0], '["dance"]\n'])


def test_the_trace_holds_no_secret(lines: list[str]) -> None:
    assert "secret" not in lines[0] and json.loads(lines[0])["pool"].keys() == {
        "num_blocks",
        "block_size",
        "caching",
    }
