"""Rows of a device that keep the states of recurrent layers at ends of blocks, found by the block's key.

What was computed before can only be taken over where a state was kept: blocks hold keys and values of every position,
but of a recurrent layer there is one state, the latest. Knows no sequences.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class Checkpoints:
    """Counts holders of rows, and finds the least recently used free one."""

    def __init__(self, rows: Iterable[int]):
        self.refs = dict.fromkeys(rows, 0)
        self.free = OrderedDict.fromkeys(self.refs)  # the next to be taken first
        self.key_of: dict[int, bytes] = {}
        self.by_key: dict[bytes, int] = {}

    def find(self, keys: Sequence[bytes]) -> int:
        """How many of a chain's first blocks end with a state that is kept, at most. Takes no hold."""
        for num in range(len(keys), 0, -1):
            if keys[num - 1] in self.by_key:
                return num
        return 0

    def hold(self, key: bytes) -> int:
        """Share the row that `find` found."""
        row = self.by_key[key]
        if not self.refs[row]:
            del self.free[row]
        self.refs[row] += 1
        return row

    def take(self) -> int | None:
        """A row to write into, whose state is forgotten; None if each has a holder."""
        if not self.free:
            return None
        row, _ = self.free.popitem(last=False)
        self._forget(row)
        self.refs[row] = 1
        return row

    def publish(self, key: bytes, row: int) -> None:
        """Make a written row findable, unless another one is by this key, and give up the hold on it."""
        if key not in self.by_key:
            self.by_key[key], self.key_of[row] = row, key
        self.release(row)

    def release(self, row: int) -> None:
        """Give up one hold."""
        self.refs[row] -= 1
        if not self.refs[row]:
            self.free[row] = None
            if row not in self.key_of:
                self.free.move_to_end(row, last=False)

    def demote(self, key: bytes) -> None:
        """Let the row of this key be the next to be taken, if nobody holds it."""
        if (row := self.by_key.get(key)) is not None and row in self.free:
            self.free.move_to_end(row, last=False)

    def forget(self, keys: Iterable[bytes]) -> None:
        """Let nobody find the states of these keys any more."""
        for key in keys:
            if (row := self.by_key.get(key)) is not None:
                self._forget(row)

    def _forget(self, row: int) -> None:
        if (key := self.key_of.pop(row, None)) is not None:
            del self.by_key[key]
