"""The scheduler on a simulated device: every sequence gets the answer that it would get alone.

Whatever is asked for, whatever the limits, whatever the depth of the pipeline.
"""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.scheduler.near import Near
from tests.scheduler.device import EOS, STOP
from tests.scheduler.workload import Case, Machine, run

BASE = tuple((i * i + i // 3) % 3 for i in range(12))
rarely = st.integers(0, 7).map(lambda n: n == 7)
prompts = st.builds(
    lambda common, rest: BASE[:common] + tuple(rest),
    st.integers(0, 12),
    st.lists(st.integers(0, 2), min_size=1, max_size=4),
)
cases = st.builds(
    Case,
    prompt=prompts,
    max_tokens=st.integers(1, 14),
    arrival=st.sampled_from((0, 0, 0, 1, 1, 2, 3, 5, 8, 12)),
    n=st.sampled_from((1, 1, 1, 2, 3)),
    priority=st.sampled_from((0, 0, 0, 1, -1)),
    tenant=st.sampled_from("aab"),
    root=st.sampled_from((0, 0, 0, 1)),
    read_cache=rarely.map(lambda skip: not skip),
    stops=st.sampled_from((frozenset({EOS}), frozenset({EOS, STOP}), frozenset(), frozenset())),
    min_tokens=st.sampled_from((0, 0, 3)),
    abort_after=st.sampled_from((*[None] * 12, 0, 1, 2, 3, 5, 8)),
    fail_at=st.sampled_from((*[0] * 12, 1, 2, 5)),
    had=st.sampled_from((*[0] * 4, 1, 2, 3, 5, 9, 13)),
)
machines = st.builds(
    Machine,
    block_size=st.integers(1, 4),
    num_blocks=st.integers(6, 32),
    max_seqs=st.sampled_from((1, 2, 3, 4, 5)),
    spare_tokens=st.sampled_from((0, 1, 2, 3, 4, 6, 9, 12, 20)),
    depth=st.integers(1, 4),
    drafts=st.sampled_from((0, 0, 1, 2, 3)),
    caching=st.booleans(),
    max_gap_s=st.sampled_from((None, None, 0.005, 0.014, 0.02)),
    min_prefill=st.integers(1, 4),
    min_prefill_time=st.sampled_from((0.0, 0.0, 0.5, 2.0)),
)
stateful = st.builds(
    lambda machine, num_states, lose_every: replace(
        machine, drafts=0, num_states=num_states, lose_every=lose_every
    ),
    machines,
    st.sampled_from((0, 1, 2, 3, 5, 9, 40)),
    st.sampled_from((0, 0, 0, 7, 11)),
)
nears = st.builds(Near, parts=st.sampled_from((0, 0, 1, 1, 2)), window=st.integers(1, 9))
chunks = st.builds(
    Near, parts=st.sampled_from((0, 1, 2)), window=st.sampled_from((None, 3)), chunk=st.integers(1, 9)
)
windowed = st.builds(
    lambda machine, how, num_blocks, depth: replace(machine, near=how, num_blocks=num_blocks, depth=depth),
    machines | stateful,
    nears,
    st.integers(8, 60),
    st.sampled_from((1, 2)),
)
near = windowed | st.builds(
    lambda machine, how: replace(machine, near=how, drafts=0, depth=2), machines | stateful, chunks
)
staged = st.builds(
    lambda machine, stages, more: replace(machine, stages=stages, depth=stages + more),
    machines | stateful | near,
    st.sampled_from((2, 2, 3, 4)),
    st.sampled_from((0, 0, 1)),
)


spanned = st.builds(
    lambda machine, tokens: replace(machine, spanned=frozenset(tokens)),
    machines | machines | stateful | windowed,
    st.sampled_from(((0,), (0,), (1,), (0, 2), (0, 1, 2))),  # the last: whole prompts
)


@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(cases, min_size=2, max_size=8), spanned)
def test_every_schedule_of_a_network_whose_positions_see_later_ones_gives_the_sequential_answer(
    todo: list[Case], machine: Machine
) -> None:
    run(todo, machine)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(cases, min_size=2, max_size=8), staged)
def test_every_schedule_of_a_device_of_stages_gives_the_sequential_answer(
    todo: list[Case], machine: Machine
) -> None:
    run(todo, machine)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(cases, min_size=2, max_size=8), near)
def test_every_schedule_of_a_network_that_sees_near_positions_gives_the_sequential_answer(
    todo: list[Case], machine: Machine
) -> None:
    run(todo, machine)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(cases, min_size=2, max_size=8), stateful)
def test_every_schedule_of_a_network_that_keeps_states_gives_the_sequential_answer(
    todo: list[Case], machine: Machine
) -> None:
    run(todo, machine)


@settings(max_examples=600, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(cases, min_size=2, max_size=8), machines)
def test_every_schedule_gives_the_sequential_answer(todo: list[Case], machine: Machine) -> None:
    run(todo, machine)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(cases, min_size=2, max_size=10), machines | stateful | near | staged | spanned)
def test_every_schedule_gives_the_sequential_answer_at_length(todo: list[Case], machine: Machine) -> None:
    run(todo, machine)
