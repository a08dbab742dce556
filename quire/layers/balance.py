"""Moves experts between ranks while a network is in use, so that all have about as much to do (parallel/experts.py).

Every so many steps the ranks add up how many tokens chose each expert, and place the experts of each layer anew. They
then move one layer's before each of the steps that follow, so that none waits for long: weights in place, whole experts
at a time, then the table that says where each is. What experts compute stays the same.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from quire.kernels import ops
from quire.layers.dispatch import Dispatch
from quire.layers.moe import Experts, MoE
from quire.log import logger
from quire.parallel.axis import Axis
from quire.parallel.experts import Placement, moves, place, settled

LEAST_GAIN = 0.03  # of the busiest rank's load; less is not worth moving weights for


class Balancer:
    """Of the layers of one rank; those of all ranks along the axis do the same before the same steps."""

    def __init__(self, layers: Sequence[MoE], axis: Axis, interval: int):
        """`interval`: steps from one look at the loads to the next."""
        self.layers = [(part.dispatch, part.experts) for part in layers if part.dispatch is not None]
        self.axis, self.interval = axis, interval
        self.num_steps, self.due = 0, deque[tuple[Dispatch, Experts, Placement]]()

    def step(self) -> None:
        """Before each step."""
        self.num_steps += 1
        if self.due:
            self._move(*self.due.popleft())
        elif self.num_steps % self.interval == 0:
            self._look()

    def _look(self) -> None:
        """Decide what has to be moved; all ranks have the same figures, and decide the same."""
        measured = self.axis.all_reduce(torch.cat([dispatch.load for dispatch, _ in self.layers]))
        loads = measured.split([len(dispatch.load) for dispatch, _ in self.layers])
        for (dispatch, experts), load in zip(self.layers, map(Tensor.tolist, loads), strict=True):
            dispatch.load.zero_()
            found = settled(place(load, self.axis.size, dispatch.num_slots), dispatch.placement)
            before, after = (max(p.loads(load)) for p in (dispatch.placement, found))
            if after < before * (1 - LEAST_GAIN):
                self.due.append((dispatch, experts, found))
                mean = sum(load) / self.axis.size
                logger.debug(
                    "experts move: the busiest rank has %.2f, then %.2f", before / mean, after / mean
                )

    def _move(self, dispatch: Dispatch, experts: Experts, placement: Placement) -> None:
        size, rank = self.axis.size, self.axis.rank
        found = moves(dispatch.placement, placement)
        sent = [[move.source for move in found if (move.giver, move.taker) == (rank, r)] for r in range(size)]
        taken = [[move.slot for move in found if (move.giver, move.taker) == (r, rank)] for r in range(size)]
        counts = list(map(len, sent)), list(map(len, taken))
        sources, slots = (list(chain.from_iterable(some)) for some in (sent, taken))
        for parts in _parts(experts.stack):
            rows = [parts[i].reshape(-1).view(torch.uint8) for i in sources]
            given = torch.stack(rows) if rows else parts[0].new_empty((0, parts[0].nbytes), dtype=torch.uint8)
            for slot, row in zip(slots, self.axis.all_to_all(given, *counts), strict=True):
                parts[slot].copy_(row.view(parts[slot].dtype).view_as(parts[slot]))
        dispatch.turn(placement)


def _parts(stack: ops.Experts | None) -> Iterator[Sequence[Tensor]]:
    """Of all that experts consist of, the tensors slot by slot, all alike."""
    if stack is None:
        raise RuntimeError("experts are moved before they are loaded")
    for packed in (stack.up, stack.down):
        yield from zip(*(ops.tensors_of(packed[i]) for i in range(len(packed))), strict=True)
    yield from (list(bias) for bias in (stack.up_bias, stack.down_bias) if bias is not None)
