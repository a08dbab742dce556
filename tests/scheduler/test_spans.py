"""Spans of prompts whose positions see each other: what may be found of them, and which steps compute them."""

from array import array

import pytest

from quire.errors import InvalidRequest
from quire.scheduler.blocks import BlockPool
from quire.scheduler.limits import Limits
from quire.scheduler.plan import Plan, Result
from quire.scheduler.scheduler import NewSequence, Scheduler
from quire.scheduler.spans import Spans, around, whole_blocks, within
from tests.scheduler.device import SECRET

SPANS: Spans = ((2, 5), (5, 8), (11, 19))


@pytest.mark.parametrize(
    ("position", "span"),
    [
        (0, None),
        (2, None),
        (3, (2, 5)),
        (4, (2, 5)),
        (5, None),
        (6, (5, 8)),
        (8, None),
        (18, (11, 19)),
        (19, None),
    ],
)
def test_a_span_is_around_what_it_has_on_both_sides(position: int, span: tuple[int, int] | None) -> None:
    assert around(SPANS, position) == span


def test_spans_within_a_range_have_a_position_of_it() -> None:
    assert [*within(SPANS, 0, 2)] == [] and [*within(SPANS, 19, 30)] == []
    assert [*within(SPANS, 4, 5)] == [(2, 5)]
    assert [*within(SPANS, 4, 6)] == [(2, 5), (5, 8)]
    assert [*within(SPANS, 7, 30)] == [(5, 8), (11, 19)]


def test_blocks_that_end_in_a_span_are_left_out_up_to_one_that_does_not() -> None:
    assert [whole_blocks(SPANS, num, 4) for num in range(6)] == [0, 0, 2, 2, 2, 5]
    assert whole_blocks(((0, 40),), 9, 4) == 0 and whole_blocks((), 9, 4) == 9


def keys(tokens: tuple[int, ...], spans: Spans = (), size: int = 2) -> list[bytes]:
    found: list[bytes] = []
    BlockPool(8, size, secret=SECRET).extend_keys(
        found, b"", array("q", tokens), len(tokens) // size, spans=spans
    )
    return found


def test_a_key_tells_what_positions_see_of_later_blocks() -> None:
    tokens = (1, 2, 3, 3, 3, 4, 5, 6)
    plain, spanned = keys(tokens), keys(tokens, ((1, 5),))
    assert plain[0] != spanned[0]
    assert keys((1, 2, 3, 3, 7, 4, 5, 6), ((1, 5),))[0] != spanned[0], "the third block's first token is seen"
    assert keys((1, 2, 3, 3, 3, 9, 9, 9), ((1, 5),))[:2] == spanned[:2], "what follows the span is not"
    assert keys(tokens, ((1, 4),))[0] != spanned[0]


def test_equal_tokens_that_see_each_other_otherwise_have_other_keys() -> None:
    """A span within one block: of a prompt, and of outputs, which see only what is before them."""
    tokens = (1, 2, 3, 3, 3, 3)
    found = {
        keys(tokens, spans, 4)[0]
        for spans in ((), ((2, 4),), ((0, 2), (2, 4)), ((0, 4),), ((2, 6),), ((2, 5),))
    }
    assert len(found) == 6


def step(at: Scheduler) -> Plan:
    plan = at.schedule(0.0)
    if plan.work:
        at.commit(plan, Result(tuple((1,) if w.samples else () for w in plan.work)), 0.0)
    return plan


def scheduler(batched: int = 12, seqs: int = 2, drafts: int = 0) -> Scheduler:
    pool = BlockPool(64, 4, secret=SECRET)
    return Scheduler(pool, Limits(max_batched_tokens=batched, max_seqs=seqs, drafts=drafts))


def sequence(id: int, prompt: tuple[int, ...], spans: Spans, max_tokens: int = 8) -> NewSequence:
    return NewSequence(id=id, prompt=prompt, max_tokens=max_tokens, spans=spans)


def test_a_span_is_computed_in_one_step() -> None:
    at = scheduler()
    at.add(sequence(0, (*range(30),), ((8, 14), (14, 25))), 0.0)
    assert [step(at).work[0].count for _ in range(4)] == [8, 6, 12, 4]


def test_a_span_waits_for_no_gap() -> None:
    at = scheduler(batched=40, seqs=2)
    at.limits = Limits(max_batched_tokens=40, max_seqs=2, max_gap_s=1e-9, min_prefill_tokens=3)
    at.add(sequence(0, (5,), ()), 0.0)
    for _ in range(3):
        plan = at.schedule(0.0)
        at.commit(plan, Result(((1,),)), 1.0)
    at.add(sequence(1, (*range(20),), ((3, 18),)), 0.0)
    assert [[w.count for w in step(at).work if w.seq == 1] for _ in range(3)] == [[3], [15], [2]]


def test_what_is_found_ends_in_no_span() -> None:
    at, prompt = scheduler(batched=40), (*range(30),)
    for id, (tokens, spans) in enumerate(
        (
            (prompt, ((6, 18),)),  # the first
            (prompt, ((6, 18),)),  # the same again: all but the last block, which holds the last token
            ((*prompt[:22], *prompt[:8]), ((6, 18),)),  # goes on otherwise after the span
            ((*prompt[:17], 99, *prompt[18:]), ((6, 18),)),  # differs in the span
            (prompt, ()),
            (prompt, ((6, 29),)),
        )
    ):
        at.add(sequence(id, tokens, spans, max_tokens=1), 0.0)
        stats = at.seqs[id].stats
        while not at.idle:
            step(at)
        assert stats.num_cached_tokens == (0, 28, 20, 4, 4, 4)[id], id


def test_of_a_span_whose_end_made_room_nothing_is_found() -> None:
    at, spans = scheduler(batched=40), ((6, 18),)
    for id, num_cached in enumerate((0, 4)):
        at.add(sequence(id, (*range(30),), spans, max_tokens=1), 0.0)
        seq = at.seqs[id]
        while not at.idle:
            step(at)
        assert seq.stats.num_cached_tokens == num_cached
        at.pool.forget([at.pool.by_key[seq.kv.keys[3]]])


def test_a_whole_prompt_that_is_a_span_is_not_waited_for() -> None:
    at = scheduler(batched=40, seqs=3)
    for id in range(2):
        at.add(sequence(id, (*range(18),), ((0, 18),)), 0.0)
    at.add(sequence(2, (*range(18), 7, 7, 7), ((0, 18),)), 0.0)  # of whose span others have no last block
    assert [w.count for w in at.schedule(0.0).work] == [18, 18] and not at.num_parked


@pytest.mark.parametrize(("drafts", "room"), [(0, 11), (2, 6)])
def test_a_span_that_no_step_has_room_for_is_refused(drafts: int, room: int) -> None:
    at = scheduler(drafts=drafts)
    assert at.limits.prefill_room == room
    at.add(sequence(0, (*range(30),), ((3, 3 + room),)), 0.0)
    message = rf"{room + 1} tokens of the prompt see each other.*room for {room}: max_num_batched_tokens \(12\).*raise"
    with pytest.raises(InvalidRequest, match=message) as refused:
        at.add(sequence(1, (*range(30),), ((3, 4 + room),)), 0.0)
    assert refused.value.param == "prompt"
