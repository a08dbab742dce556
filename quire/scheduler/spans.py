"""Spans of a prompt whose positions see each other, later ones too. Steps and what is found again end in none."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from operator import itemgetter

Spans = tuple[tuple[int, int], ...]  # from and up to which position: in order, apart, of at least 2 positions


def around(spans: Spans, position: int) -> tuple[int, int] | None:
    """The span that has both this position and the one before it."""
    i = bisect_left(spans, (position,)) - 1
    return spans[i] if i >= 0 and spans[i][1] > position else None


def within(spans: Spans, first: int, end: int) -> Iterator[tuple[int, int]]:
    """Spans that have positions of first .. end - 1."""
    for i in range(bisect_right(spans, first, key=itemgetter(1)), len(spans)):
        if spans[i][0] >= end:
            return
        yield spans[i]


def whole_blocks(spans: Spans, num: int, size: int) -> int:
    """The most of a sequence's first `num` blocks of `size` positions that do not end in a span."""
    while (span := around(spans, num * size)) is not None:
        num = span[0] // size
    return num
