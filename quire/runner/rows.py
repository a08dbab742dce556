"""Whose rows a step's are, and what these sequences have in common: on the device, sent when it changes."""

from collections.abc import Sequence

import numpy as np
import torch

from quire.attention.base import Shared
from quire.runner.sharing import LEAST_MEMBERS, find_groups
from quire.runner.staging import send
from quire.runner.state import SlotState
from quire.scheduler.plan import Work

GROUP_SIZE = 16  # members of a group of sequences whose beginnings attention reads once


class Rows:
    """The rows of steps of newest tokens, for as many as there are slots.

    Attributes:
        slots: [num_slots] int64; nobody's past the last row.
        shares: enough is in common for attention to read it once.
    """

    def __init__(self, state: SlotState, block_size: int, *, share: bool):
        """`share`: whether attention wants to know what sequences have in common."""
        self.state, self.block_size = state, block_size
        most, device = state.nobody, state.tokens.device
        self.slots = torch.full((most,), most, dtype=torch.int64, device=device)
        self.placed: tuple[list[int], int] = (
            [],
            0,
        )  # slots without padding, and how many have started before
        self.shares = False
        self.shared: Shared | None = None
        if share:
            self.shared = Shared(
                members=torch.zeros(_num_groups(most), GROUP_SIZE, dtype=torch.int32, device=device),
                member_pages=torch.zeros(_num_groups(most), dtype=torch.int32, device=device),
                num_pages=torch.zeros(most, dtype=torch.int32, device=device),
            )

    def place(self, work: Sequence[Work]) -> None:
        """Tell the device whose rows follow, if it does not know."""
        placed = [w.slot for w in work], self.state.num_starts
        if placed == self.placed:
            return
        slots = np.full(len(self.slots), self.state.nobody)
        slots[: len(work)] = placed[0]
        send(slots, self.slots)
        self.shares = self.shared is not None and self._share(work, self.shared)
        self.placed = placed

    def first(self, num_rows: int) -> Shared | None:
        """What the first rows have in common, in the same memory each time."""
        return self.shared and self.shared.first(_num_groups(num_rows), num_rows)

    def _share(self, work: Sequence[Work], shared: Shared) -> bool:
        """Tell the device which rows begin with the same blocks, if there is enough that they share."""
        tables, complete = (
            [self.state.blocks[w.slot] for w in work],
            [w.start // self.block_size for w in work],
        )
        groups = find_groups(tables, complete, self.block_size)
        if not groups:
            return False
        members = np.full(shared.members.shape, -1, np.int32)
        pages, own = np.zeros(len(members), np.int32), np.zeros(len(shared.num_pages), np.int32)
        index = 0
        for rows, num_blocks in groups:
            own[rows] = num_blocks
            for begin in range(0, len(rows), GROUP_SIZE):
                some = rows[begin : begin + GROUP_SIZE]
                members[index, : len(some)], pages[index] = some, num_blocks
                index += 1
        send(members, shared.members)
        send(pages, shared.member_pages)
        send(own, shared.num_pages)
        return True


def _num_groups(num_rows: int) -> int:
    """The most groups that so many rows can be in: full ones, and what is left over of each."""
    return num_rows // GROUP_SIZE + max(num_rows // LEAST_MEMBERS, 1)
