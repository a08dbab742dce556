"""Who runs: sequences in order of rank, and their slots on the device. Knows no blocks and no budget."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import heappop, heappush, merge
from itertools import takewhile

from quire.scheduler.sequence import BY_RANK, Sequence, State


class Seats:
    """Running sequences, best first. A slot is taken at the first work, and given up with the seat."""

    def __init__(self, num_seats: int):
        self.num_seats = num_seats
        self.prefilling: list[Sequence] = []
        self.decoding: list[Sequence] = []
        self._free = list(range(num_seats))  # a heap: low slots first keeps batches compact
        self._ended: list[int] = []

    @property
    def num_taken(self) -> int:
        """Sequences that run."""
        return len(self.prefilling) + len(self.decoding)

    @property
    def is_full(self) -> bool:
        """Whoever wants to run has to take another's seat."""
        return self.num_taken == self.num_seats

    @property
    def worst(self) -> Sequence:
        """The first to lose its seat: of the lowest priority the latest to arrive."""
        return max((line[-1] for line in (self.prefilling, self.decoding) if line), key=BY_RANK)

    def worse_than(self, priority: int) -> Iterator[Sequence]:
        """Running sequences of lower priority, the worst first."""
        lines = reversed(self.prefilling), reversed(self.decoding)
        return takewhile(lambda seq: seq.rank[0] > priority, merge(*lines, key=BY_RANK, reverse=True))

    @property
    def has_ends(self) -> bool:
        """A device has still to hear of slots given up."""
        return bool(self._ended)

    def enter(self, seq: Sequence) -> None:
        """Give a sequence a seat."""
        seq.state = State.PREFILLING
        insort(self.prefilling, seq, key=BY_RANK)

    def decode(self, seq: Sequence) -> None:
        """All of the sequence's known tokens are planned."""
        _remove(self.prefilling, seq)
        seq.state = State.DECODING
        insort(self.decoding, seq, key=BY_RANK)

    def take_slot(self, seq: Sequence) -> None:
        """Make the sequence known to the device."""
        seq.slot = heappop(self._free)

    def leave(self, seq: Sequence) -> None:
        """Take a sequence's seat and slot away."""
        _remove(self.decoding if seq.state is State.DECODING else self.prefilling, seq)
        if seq.slot >= 0:
            heappush(self._free, seq.slot)
            self._ended.append(seq.slot)
            seq.slot = -1

    def collect_ends(self) -> tuple[int, ...]:
        """Slots given up since the last call."""
        ended, self._ended = self._ended, []
        return tuple(ended)


def _remove(line: list[Sequence], seq: Sequence) -> None:
    del line[bisect_left(line, seq.rank, key=BY_RANK)]
