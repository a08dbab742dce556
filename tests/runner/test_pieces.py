"""Pieces cover a step's work once and in order, and are as large as memory lately allowed."""

from hypothesis import given, settings
from hypothesis import strategies as st

from quire.runner.pieces import CALM_STEPS, PieceSize
from quire.scheduler.plan import Work
from quire.scheduler.spans import Spans, around

NONE: list[Spans] = [()] * 6  # spans of slots


def make_work(counts: list[int]) -> list[Work]:
    return [Work(seq, seq, 0, 5 * seq, True, count, 0, (), seq % 2 == 0) for seq, count in enumerate(counts)]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 60))
def test_pieces_cover_the_work_in_order(counts: list[int], too_many: int) -> None:
    size, work = PieceSize(), make_work(counts)
    size.ran_out(too_many)
    pieces = list(size.split(work, NONE))
    assert all(0 < sum(w.count for w in piece) <= max(too_many // 2, 1) for piece in pieces)
    assert all(len({w.seq for w in piece}) == len(piece) for piece in pieces)
    positions = [(w.seq, p) for piece in pieces for w in piece for p in range(w.start, w.start + w.count)]
    assert positions == [(w.seq, p) for w in work for p in range(w.start, w.start + w.count)]
    samples = [(w.seq, w.start + w.count) for piece in pieces for w in piece if w.samples]
    assert samples == [(w.seq, w.start + w.count) for w in work if w.samples]


def test_pieces_grow_again_when_memory_lasts() -> None:
    size, work = PieceSize(), make_work([40])
    assert [len(piece) for piece in size.split(work, NONE)] == [1]
    size.ran_out(40)
    size.ran_out(20)
    assert len(list(size.split(work, NONE))) == 4
    for _ in range(CALM_STEPS):
        size.went_well()
    assert len(list(size.split(work, NONE))) == 2
    for _ in range(CALM_STEPS):
        size.went_well()
    assert list(size.split(work, NONE)) == [tuple(work)]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(1, 40))
def test_pieces_divide_no_span(sizes: list[int], too_many: int) -> None:
    size, work = PieceSize(), make_work([2 * n + 3 for n in sizes])
    spans = [((w.start + 1, w.start + w.count - 1),) if n else () for w, n in zip(work, sizes, strict=True)]
    size.ran_out(too_many)
    pieces = list(size.split(work, spans))
    positions = [(w.seq, p) for piece in pieces for w in piece for p in range(w.start, w.start + w.count)]
    assert positions == [(w.seq, p) for w in work for p in range(w.start, w.start + w.count)]
    for piece in pieces:
        assert not any(around(spans[w.slot], end) for w in piece for end in (w.start, w.start + w.count))
        most, count = max(too_many // 2, 1), sum(w.count for w in piece)
        assert count > 0 and (count <= most or len(piece) == 1 and spans[piece[0].slot])
