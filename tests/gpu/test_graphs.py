"""Decode steps as CUDA graphs: what they compute is what steps without graphs compute, and nothing waits.

Prints what one needs to see from afar: `python -m pytest tests/gpu/test_graphs.py -s`.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from quire.config import Config
from quire.engine.engine import Engine
from quire.runner.advance import ENDED
from quire.runner.batch import make_batch
from quire.runner.fixed import FixedKind, FixedSteps
from quire.runner.graphs import Graphs
from quire.runner.mixed import MixedKind
from quire.runner.runner import Runner
from quire.sampling.sampler import EXTRAS
from quire.scheduler.plan import Work
from quire.types import OutputKind, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.0},
    {"temperature": 1.2, "top_k": 40, "min_p": 0.02},
]
SCORED = {"temperature": 0.7, "logprobs": 3}
ODD: list[dict[str, Any]] = [
    {"temperature": 0.9, "repetition_penalty": 1.2},
    {"temperature": 0.0, "logit_bias": {5: 3.0}},
    {"temperature": 1.0, "logprobs": 0},
    {"temperature": 0.0, "frequency_penalty": 0.7, "presence_penalty": 0.2, "logprobs": 2},
    {"temperature": 0.8, "allowed_token_ids": list(range(3, 3000, 7)), "bad_words": ["the", "a fox"]},
]
Asked = list[tuple[list[int], SamplingParams, int]]  # prompt, parameters, step at which it comes
Got = dict[str, list[tuple[list[int], Any]]]  # each sequence's tokens and log probabilities


def make_engine(dtype: str, **options: Any) -> Engine:
    base = {
        "model": "demo",
        "device": "cuda",
        "dtype": dtype,
        "max_model_len": 256,
        "max_num_seqs": 20,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 256 << 20,
    }
    return Engine(Config.of(**base | options), offline=True)


def workload(seed: int, kinds: Sequence[dict[str, Any]], count: int = 14, max_tokens: int = 48) -> Asked:
    chance = random.Random(seed)
    asked: Asked = []
    for i in range(count):
        prompt = [chance.randrange(3, 3000) for _ in range(chance.randrange(1, 90))]
        kind = kinds[i % len(kinds)]
        params = SamplingParams(
            **kind,
            n=1 if kind["temperature"] == 0 else chance.choice([1, 1, 2]),
            seed=chance.randrange(1000),
            max_tokens=chance.randrange(1, max_tokens + 1),
            ignore_eos=True,
            output_kind=OutputKind.FINAL_ONLY,
        )
        asked.append((prompt, params, chance.randrange(60)))
    return sorted(asked, key=lambda item: item[2])


def run(engine: Engine, asked: Asked) -> Got:
    got: Got = {}
    step, waiting = 0, list(enumerate(asked))
    while waiting or not engine.idle:
        while waiting and waiting[0][1][2] <= step:
            i, (prompt, params, _) = waiting.pop(0)
            engine.add(engine.inputs.request(prompt, params, request_id=str(i)))
        for output in engine.step():
            got[output.request_id] = [(list(o.token_ids), o.logprobs) for o in output.outputs]
        step += 1
        assert step < 10_000, "no progress"
    assert engine.core.stats().used_blocks == 0
    return got


def fixed_of(engine: Engine) -> FixedSteps:
    fixed = engine.core.runner.fixed
    assert fixed is not None, "the engine has no graphs; its log says why"
    return fixed


def without_capture(engine: Engine) -> Engine:
    fixed_of(engine).graphs = Graphs(capture=False)
    return engine


def without_fixed_steps(engine: Engine) -> Engine:
    engine.core.runner.fixed = engine.core.runner.mixed = None
    return engine


def compare(name: str, got: Got, want: Got, asked: Asked) -> float:
    """Print each sequence's first difference; the share of tokens before them."""
    same = total = 0
    for key in sorted(want, key=int):
        for index, (ours, theirs) in enumerate(zip(got[key], want[key], strict=True)):
            pairs = zip(ours[0], theirs[0], strict=True)
            first = next((i for i, (a, b) in enumerate(pairs) if a != b), len(theirs[0]))
            same, total = same + first, total + len(theirs[0])
            if first < len(theirs[0]):
                prompt, params, step = asked[int(key)]
                print(
                    f"  {name}: request {key}.{index} (prompt of {len(prompt)}, step {step},"
                    f" temperature {params.temperature}) differs at token {first} of {len(theirs[0])}:"
                    f" {ours[0][first : first + 4]} for {theirs[0][first : first + 4]}"
                )
    print(f"  {name}: {same} of {total} tokens before a first difference")
    return same / total


def report(name: str, fixed: FixedSteps) -> None:
    graphs = fixed.graphs
    kinds = sorted(map(str, graphs.captured))
    print(
        f"  {name}: {len(graphs.captured)} graphs, {len(graphs.ready)} kinds, {fixed.ring.num_steps} whole steps,"
        f" failed {graphs.has_failed}, reserved {torch.cuda.memory_reserved() >> 20} MiB: {kinds}"
    )


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_equal_the_same_steps_uncaptured(dtype: str, overlap: bool) -> None:
    """To the bit, log probabilities too; and a second run, all replays, equals the first."""
    engine = make_engine(dtype, async_scheduling=overlap)
    plain = without_capture(make_engine(dtype, async_scheduling=overlap))
    for seed, kinds in enumerate(([{"temperature": 0.0}], KINDS, [*KINDS, SCORED], [*KINDS, SCORED, *ODD])):
        asked = workload(seed, kinds)
        want = run(plain, asked)
        for turn in range(2):
            got = run(engine, asked)
            share = compare(f"{dtype} seed {seed} turn {turn}", got, want, asked)
            assert share == 1.0 and got == want
    report(dtype, fixed_of(engine))
    captured = fixed_of(engine).graphs.captured
    assert {EXTRAS & kind.uses for kind in captured if isinstance(kind, FixedKind) and kind.uses} >= {EXTRAS}
    assert len(captured) > 4 and any(isinstance(kind, MixedKind) for kind in captured)
    assert fixed_of(engine).graphs.has_failed is False


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_equal_ordinary_steps(dtype: str) -> None:
    """In bfloat16 a product of more rows is rounded otherwise, and what follows another token differs altogether."""
    engine, plain = make_engine(dtype), without_fixed_steps(make_engine(dtype))
    for seed in range(3):
        asked = workload(10 + seed, [*KINDS, *ODD])
        run(engine, asked)
        share = compare(f"{dtype} seed {seed}", run(engine, asked), run(plain, asked), asked)
        assert share == 1.0 if dtype == "float32" else share > 0.3
    report(dtype, fixed_of(engine))
    assert fixed_of(engine).graphs.has_failed is False


def test_preemption_changes_nothing() -> None:
    engine = make_engine("float32", block_size=16)
    block_bytes = engine.config.kv_cache_memory_bytes // engine.core.stats().num_blocks
    asked = workload(5, KINDS, max_tokens=120)
    want = run(engine, asked)
    tight = make_engine("float32", block_size=16, kv_cache_memory_bytes=18 * block_bytes)
    for _ in range(2):
        assert compare("tight", run(tight, asked), want, asked) == 1.0
    print(f"  {tight.core.stats().num_preemptions} preemptions")
    assert tight.core.stats().num_preemptions > 0
    report("tight", fixed_of(tight))


def checking(runner: Runner, inner: Callable[[Sequence[Work]], Any]) -> Callable[[Sequence[Work]], Any]:
    """Before each step, what the device knows is compared with what the host plans."""

    def sample(work: Sequence[Work]) -> Any:
        fixed = runner.fixed
        assert fixed is not None
        batch = make_batch(work, runner.state)
        started = inner(work)
        if started is not None:
            torch.cuda.synchronize()
            count, ragged = len(work), batch.ragged
            inputs = fixed.inputs
            pairs = {
                "token_ids": (inputs.token_ids[:count], batch.token_ids),
                "positions": (inputs.positions[:count], ragged.positions),
                "slot_mapping": (inputs.slot_mapping[:count], ragged.slot_mapping),
                "query_starts": (inputs.query_starts[: count + 1], ragged.query_starts),
                "lengths": (inputs.lengths[:count], ragged.lengths),
            }
            for name, (ours, theirs) in pairs.items():
                assert torch.equal(ours, theirs), (name, ours.tolist(), theirs.tolist(), work)
            for row, length in enumerate(ragged.lengths.tolist()):
                used = -(-length // runner.state.block_size)
                ours, theirs = inputs.tables[row, :used].tolist(), ragged.block_tables[row, :used].tolist()
                assert ours == theirs, (row, ours, theirs)
        return started

    return sample


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_common_beginning_changes_nothing(dtype: str) -> None:
    """Many requests with a long prompt in common, of which attention reads the cache once."""
    options = {"max_model_len": 2048, "enable_prefix_caching": True, "max_num_seqs": 40}
    engine, plain = make_engine(dtype, **options), without_fixed_steps(make_engine(dtype, **options))
    chance = random.Random(1)
    common = [chance.randrange(3, 3000) for _ in range(1500)]
    shared = {"ignore_eos": True, "output_kind": OutputKind.FINAL_ONLY, "temperature": 0.0}
    asked: Asked = [
        (
            common[: 700 + 800 * (i % 4 > 0)] + [3 + i] * (1 + i % 5),
            SamplingParams(**shared, max_tokens=24 + i),
            i // 8,
        )
        for i in range(32)
    ]
    run(engine, asked)
    share = compare(dtype, run(engine, asked), run(plain, asked), asked)
    assert share == 1.0 if dtype == "float32" else share > 0.3
    assert {kind.shares for kind in fixed_of(engine).graphs.captured if isinstance(kind, FixedKind)} == {
        True,
        False,
    }
    report(dtype, fixed_of(engine))


def test_the_device_knows_what_the_host_plans() -> None:
    engine = make_engine("bfloat16")
    fixed = fixed_of(engine)
    fixed.sample = checking(engine.core.runner, fixed.sample)  # type: ignore[method-assign]
    for seed in range(2):
        run(engine, workload(20 + seed, KINDS))
    report("checked", fixed)
    assert fixed.ring.num_steps > 50 and fixed.graphs.captured


def test_the_device_ends_sequences_as_the_scheduler_does() -> None:
    """By stop tokens that no graph was captured with, in slots that go to others, beside rules on the same tokens."""
    engine, plain = make_engine("float32", async_scheduling=True), without_fixed_steps(make_engine("float32"))
    fixed = fixed_of(engine)
    start, reports = fixed.start, []

    def reported(*args: Any) -> Any:
        reports.append(start(*args))
        return reports[-1]

    fixed.start = reported  # type: ignore[method-assign]
    for seed in range(3):
        stops = list(range(3 + seed, 4000, 29 + seed))
        kinds = [{**kind, "stop_token_ids": stops, "min_tokens": seed % 2} for kind in [*KINDS, *ODD]]
        asked = workload(40 + seed, kinds, count=30)
        want = run(plain, asked)
        for _ in range(2):
            got = run(engine, asked)
            assert compare(f"stops {seed}", got, want, asked) == 1.0
    num_ended = sum(fetch().token_ids.count(ENDED) for fetch in reports if fetch is not None)
    print(f"  {num_ended} rows had ended on the device")
    assert num_ended > 10 and fixed.graphs.has_failed is False
    report("stops", fixed)


def test_nothing_waits_in_a_steady_step() -> None:
    """Through new blocks, an end, and another kind of sampling; waiting for a step's own result is not counted."""
    engine = make_engine("bfloat16", max_model_len=512)
    core = engine.core
    kinds = [*KINDS, SCORED, *KINDS, *ODD]
    for turn in range(2):  # in the first one graphs are captured
        for i, kind in enumerate(kinds):
            params = SamplingParams(**kind, seed=i, max_tokens=150 - 9 * i, ignore_eos=True)
            engine.add(engine.inputs.request([5 + i] * 30, params, request_id=f"{turn}.{i}"))
        while core.stats().batched_tokens != len(kinds) or core.stats().num_waiting:
            engine.step()
        if turn:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        num_steps = 0
        try:
            while not engine.idle:
                engine.step()
                num_steps += 1
        finally:
            torch.cuda.set_sync_debug_mode("default")
        print(f"  {num_steps} steps without waiting")
    report("steady", fixed_of(engine))
    assert fixed_of(engine).graphs.has_failed is False


def test_a_failing_capture_leaves_a_working_engine(caplog: pytest.LogCaptureFixture) -> None:
    asked = workload(30, KINDS)
    want = run(without_fixed_steps(make_engine("float32")), asked)
    engine = make_engine("float32")
    fixed = fixed_of(engine)
    inner = fixed.model.logits

    def waits(hidden: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            hidden.sum().item()  # what no graph can hold
        return inner(hidden)

    fixed.model.logits = waits  # type: ignore[method-assign]
    with caplog.at_level("WARNING", "quire"):
        for _ in range(2):
            assert compare("failing", run(engine, asked), want, asked) == 1.0
    warnings = [r.message for r in caplog.records if "CUDA graph" in r.message]
    print(f"  warnings: {warnings}")
    assert len(warnings) == 1
    report("failing", fixed)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # torch refuses that while it believes in a capture
    with torch.cuda.graph(
        torch.cuda.CUDAGraph()
    ):  # after a failed one torch's generator waits for another's end
        torch.zeros(1, device="cuda")
    torch.randn(1, device="cuda")
