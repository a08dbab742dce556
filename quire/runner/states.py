"""The states of recurrent layers on a device: a row for each slot, nobody's, and those that the scheduler keeps.

rows: | slot 0 | slot 1 | .. | nobody's | kept | kept | .. |
"""

from collections.abc import Iterable

from torch import Tensor

from quire.scheduler.plan import Start, Work


class StatesLost(Exception):
    """A step failed that was under way: some layers' states have gone on, and others' have not."""


class StateRows:
    """Rows that are copied and reset as a whole, in the order of the device's work.

    Attributes:
        lost: slots whose state is another than what their sequence has computed, until another sequence takes them.
    """

    def __init__(self, rows: Tensor):
        """`rows`: [num_rows, state_bytes] uint8."""
        self.rows = rows
        self.lost: set[int] = set()

    def begin(self, starts: Iterable[Start]) -> None:
        """Give new sequences the states that they begin with."""
        for start in starts:
            mine = self.rows[start.slot]
            if start.restore < 0:
                mine.zero_()
            else:
                mine.copy_(self.rows[start.restore])
            self.lost.discard(start.slot)

    def keep(self, work: Iterable[Work]) -> None:
        """Copy the states that the plan wants to be kept after its work."""
        for w in work:
            if w.save >= 0:
                self.rows[w.save].copy_(self.rows[w.slot])
