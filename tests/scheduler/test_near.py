"""What sequences give up behind windows and chunks, and what is found of it afterwards."""

import pytest

from quire.errors import ConfigError, InvalidRequest
from quire.scheduler.blocks import BlockPool
from quire.scheduler.holdings import Holdings
from quire.scheduler.limits import Limits
from quire.scheduler.near import Extent, Near
from quire.scheduler.plan import Plan, Result
from quire.scheduler.scheduler import NewSequence, Scheduler
from tests.scheduler.device import SECRET
from tests.scheduler.workload import Case, Machine, run

SIZE = 4
PROMPT = tuple(i * i % 5 for i in range(40))


def scheduler(near: Near, num_blocks: int = 60, batched: int = 8) -> Scheduler:
    pool = BlockPool(num_blocks, SIZE, secret=SECRET, near=near)
    return Scheduler(pool, Limits(max_batched_tokens=batched, max_seqs=4))


def step(at: Scheduler) -> Plan:
    plan = at.schedule(0.0)
    if plan.work:
        at.commit(plan, Result(tuple((1,) if w.samples else () for w in plan.work)), 0.0)
    return plan


def sequence(id: int, prompt: tuple[int, ...], max_tokens: int = 30) -> NewSequence:
    return NewSequence(id=id, prompt=prompt, max_tokens=max_tokens)


@pytest.mark.parametrize("parts", [0, 1, 3])
def test_a_long_sequence_holds_what_its_window_needs(parts: int) -> None:
    near = Near(parts=parts, window=9)
    at = scheduler(near, num_blocks=100)
    at.add(sequence(0, PROMPT), 0.0)
    most = 0
    while not at.idle:
        step(at)
        for seq in at.seqs.values():
            held = len(seq.kv.near) if parts else len(seq.kv.blocks) - seq.kv.passed
            most = max(most, held)
            if seq.planned > len(PROMPT) + SIZE:
                assert held <= -(-9 // SIZE) + 2, "more than the window while it decodes"
    assert most <= Extent(near, SIZE, 8).span == (9 + 2 * 8 + 3) // 4 + 1
    assert not any(at.pool.refs)


def test_sequences_that_would_not_fit_whole_run_at_once() -> None:
    at = scheduler(Near(parts=3, window=9), num_blocks=100)  # without windows, 17 positions' blocks times 4
    for id in range(3):
        at.add(sequence(id, (id, *PROMPT)), 0.0)
    for _ in range(30):
        step(at)
    assert at.num_running == 3 and not at.num_preemptions
    assert sum(len(seq.kv.blocks) for seq in at.seqs.values()) * 4 > 100


@pytest.mark.parametrize("near", [Near(parts=1, window=9), Near(parts=0, window=9), Near(parts=2, chunk=8)])
def test_a_conversation_goes_on_where_it_was(near: Near) -> None:
    at = scheduler(near)
    at.add(sequence(0, PROMPT, 6), 0.0)
    while not at.idle:
        step(at)
    stats = at.add(sequence(1, (*PROMPT, *[1] * 6, 2, 2), 2), 0.0)
    step(at)
    assert stats.num_cached_tokens == 44, "all full blocks of the prompt and the outputs"


def test_what_was_given_up_and_taken_by_others_is_computed_again() -> None:
    at = scheduler(Near(parts=1, window=9), num_blocks=24)
    at.add(sequence(0, PROMPT, 2), 0.0)
    while not at.idle:
        step(at)
    findable = set(at.pool.by_key)
    stats = at.add(sequence(1, PROMPT[:20], 2), 0.0)
    step(at)
    assert stats.num_cached_tokens == 16, "what the window before it sees is there, given up as it is"
    while not at.idle:
        step(at)
    at.pool.forget([at.pool.by_key[key] for key in findable if len(key) > 16])  # near blocks
    stats = at.add(sequence(2, PROMPT[:20], 2), 0.0)
    step(at)
    assert stats.num_cached_tokens == 0
    while not at.idle:
        step(at)
    stats = at.add(sequence(3, PROMPT[:20], 2), 0.0)
    step(at)
    assert stats.num_cached_tokens == 16, "what was computed again is found beside the new blocks"


def test_a_step_ends_where_a_chunk_does() -> None:
    at = scheduler(Near(parts=1, chunk=12), batched=32)
    at.add(sequence(0, PROMPT, 1), 0.0)
    counts = [w.count for _ in range(4) for w in step(at).work]
    assert counts == [12, 12, 12, 4]


@pytest.mark.parametrize("parts", [0, 1, 2])
@pytest.mark.parametrize("num_blocks", [6, 7, 9, 10, 13, 20, 31])
def test_what_has_room_runs_alone_and_more_is_refused(parts: int, num_blocks: int) -> None:
    near, batched = Near(parts=parts, window=5), 4
    pool = BlockPool(num_blocks, SIZE, secret=SECRET, near=near)
    room = Holdings(pool, batched).room
    if room is None:
        assert parts == 0 and Extent(near, SIZE, batched).span <= num_blocks
        room = 20 * SIZE
    else:
        at = scheduler(near, num_blocks, batched)
        with pytest.raises(InvalidRequest, match=f"the KV cache holds {room + 1}"):
            at.add(sequence(0, (1,) * room, 2), 0.0)
    machine = Machine(SIZE, num_blocks, max_seqs=1, spare_tokens=3, depth=2, near=near)
    for length in {1, room // 2, room - 1} - {0}:
        prompt = tuple(i % 3 for i in range(length))
        run([Case(prompt, room - length + 1, 0, stops=frozenset())], machine)


def test_what_sees_nothing_is_refused() -> None:
    for kwargs in ({}, {"window": 0}, {"chunk": 0}, {"window": 4, "chunk": 0}):
        with pytest.raises(ConfigError, match="window or a chunk"):
            Near(parts=1, **kwargs)
    with pytest.raises(ConfigError, match="drafts is 1"):
        pool = BlockPool(9, SIZE, secret=SECRET, near=Near(parts=1, chunk=8))
        Scheduler(pool, Limits(max_batched_tokens=8, max_seqs=2, drafts=1))


def test_a_prefill_that_finds_no_blocks_has_later_ones_make_way_or_waits() -> None:
    at = scheduler(Near(parts=1, window=9), num_blocks=300)
    at.add(NewSequence(id=2, prompt=(4, 4, 4), max_tokens=60, priority=2), 0.0)
    step(at)
    at.add(NewSequence(id=1, prompt=(3, *PROMPT), max_tokens=30, priority=1), 0.0)
    step(at)
    at.add(sequence(0, PROMPT * 6), 0.0)
    step(at)
    first, last, decoding = at.seqs[0], at.seqs[1], at.seqs[2]
    while not first.kv.passed or decoding.planned % SIZE != 1 or first.planned + 7 <= first.kv.capacity:
        step(at)

    def starve() -> list[int]:
        """Nothing is free, and what the first gives up is not either, as somebody else reads it."""
        kept = [block for near in first.kv.near for block in near]
        at.pool.hold(kept)
        return kept + at.pool.take(at.pool.num_free)

    kept = starve()
    assert {w.seq for w in step(at).work} == {2, 0}, "who decodes, and who came first"
    assert (at.num_preemptions, last.stats.num_preemptions) == (1, 1)
    at.abort(2)
    at.abort(1)
    while first.planned + 8 <= first.kv.capacity:
        step(at)
    kept += starve()
    assert not step(at).work and first.kv.blocks, "nobody is left to make way"
    at.pool.release(kept)
    while not at.idle:
        step(at)
    assert at.num_preemptions == 1 and not any(at.pool.refs)
