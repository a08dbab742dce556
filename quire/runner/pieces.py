"""A step's work in pieces that memory has room for. Knows no device."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from quire.scheduler.plan import Work
from quire.scheduler.spans import Spans, around

CALM_STEPS = 256  # without a shortage, before larger pieces are tried again


class PieceSize:
    """How many positions are computed at once: halved when memory runs out, and doubled when it has not for a while.

    Work is computed in order, and a sequence's results do not depend on its company, so pieces change no token.
    """

    def __init__(self) -> None:
        self.most: int | None = None  # positions; None: a whole step
        self.num_calm = 0

    def ran_out(self, num_positions: int) -> None:
        """So many positions at once were too many."""
        self.most, self.num_calm = max(num_positions // 2, 1), 0

    def went_well(self) -> None:
        """A step was computed."""
        if self.most is not None:
            self.num_calm += 1
            if self.num_calm == CALM_STEPS:
                self.most, self.num_calm = self.most * 2, 0

    def split(self, work: Sequence[Work], spans: Sequence[Spans]) -> Iterator[tuple[Work, ...]]:
        """The work in order, in pieces of at most `most` positions, or of one span; a sequence's share may be divided.

        `spans`: of each slot, which are not.
        """
        if self.most is None or sum(w.count for w in work) <= self.most:
            yield tuple(work)
            return
        piece: list[Work] = []
        room = self.most
        for w in work:
            start, end = w.start, w.start + w.count
            while start < end:
                count = min(end - start, room)
                if (span := around(spans[w.slot], start + count)) is not None:
                    count = span[0] - start or (0 if piece else span[1] - start)
                last = start + count == end
                if count:
                    piece.append(replace(w, start=start, count=count, samples=w.samples and last))
                start, room = start + count, room - count
                if room <= 0 or span is not None:
                    yield tuple(piece)
                    piece, room = [], self.most
        if piece:
            yield tuple(piece)
