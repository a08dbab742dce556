"""Whole experts, spread over ranks: which are here, and how tokens get to them and what these make of them back.

    gather    everybody's rows, padded ──> what experts here make of those that chose them ──> sums, each to its rank
    exchange  a slice of the rows ──> each to the ranks of its experts, counts uneven ──> back, summed at home

The first takes the same memory and kernels whatever is chosen, so it can be part of a graph. The second moves a row
only to where it is wanted, and the host has to know how many these are. Ranks along tp and cp have the same rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from quire.kernels import ops
from quire.layers.base import Build, Spreading
from quire.layers.norm import Normed
from quire.models import spec
from quire.parallel.experts import Placement, place

EXCHANGE = "all_to_all"
FEW_ROWS = 512  # for which no host waits for its device
TURNS = 64  # rows, after which an expert's replicas are taken in the same order again

Seen = Callable[[Normed], tuple[Tensor, ops.RowScale | None, ops.Routes]]


class Dispatch:
    """One layer's experts over the ranks of `axes.ep`.

    Attributes:
        placement: which rank holds which.
        load: tokens that chose each expert, [num_experts] int64, of this rank's slice of its rows; if anybody asks.
    """

    def __init__(self, s: spec.MoE, build: Build, spreading: Spreading):
        self.spec, self.build, self.spreading = s, build, spreading
        self.axes, experts = spreading.axes, spreading.experts
        axes, self.num_slots = self.axes, experts.num_slots(s)
        self.num_alike = axes.tp.size  # ranks with the same rows
        self.load = torch.zeros(s.num_experts, dtype=torch.int64, device=build.device)
        turns = 1 if build.invariant else TURNS
        self.table = torch.zeros(s.num_experts, turns, dtype=torch.int32, device=build.device)
        self.turn(place([1.0] * s.num_experts, axes.ep.size, self.num_slots))

    @property
    def held(self) -> tuple[int, ...]:
        """The experts here, slot by slot."""
        return self.placement.ranks[self.axes.ep.rank]

    def turn(self, placement: Placement) -> None:
        """From now on experts are where this says; whoever calls sees to it that they are."""
        self.placement = placement
        turns = range(self.table.shape[1])
        found = [[slots[i % len(slots)] for i in turns] for slots in placement.replicas()]
        self.table.copy_(torch.tensor(found, dtype=torch.int32))

    def __call__(
        self, y: Normed, see: Seen, stack: ops.Experts, shared: Callable[[Normed], ops.Shared | None]
    ) -> Tensor:
        """y [T, dim] -> the sum of what all experts make of it, [T, dim]. `see`: what they see of y, and who does.

        `shared` makes this rank's part, along tp, of one that sees every token.
        """
        axes, beside = self.axes, shared(y)
        if self.exchanges(len(y.values)):
            total = _with(self._exchange(y.tensor(), see, stack), beside)
        elif axes.dp.size > 1:
            total = _with(self._gather(y.tensor(), see, stack), beside)
        else:
            values, scale, routes = see(y)
            self._count(routes, self._mine(len(values)))
            total = ops.experts(values, scale, self._here(routes), stack, beside)
        return axes.tp.all_reduce(total)

    def _most_rows(self, num_rows: int) -> int:
        """Of any rank."""
        return num_rows if self.axes.dp.size == 1 else self.spreading.most_rows

    def exchanges(self, num_rows: int) -> bool:
        """Whether tokens go to the ranks of their experts only, with so many here. The same on all ranks.

        Else each goes to all groups, and each group has memory for what the experts make of everybody's: where there
        are many, that is for a few groups only, even if it moves less.
        """
        if self.spreading.experts.way != "auto":
            return self.spreading.experts.way == EXCHANGE
        few = self._most_rows(num_rows) <= FEW_ROWS or self.build.invariant
        others = (self.axes.dp.size - 1) * self.num_alike
        return not few and self.spec.top_k <= 2 * others

    def _gather(self, x: Tensor, see: Seen, stack: ops.Experts) -> Tensor:
        """x [T, dim] -> this rank's part along tp."""
        dp, count, most = self.axes.dp, len(x), self._most_rows(len(x))
        values, scale, routes = see(Normed(dp.all_gather(pad(x, (0, 0, 0, most - count)))))
        first = dp.rank * most
        mine = self._mine(count)
        self._count(routes, slice(first + mine.start, first + mine.stop))
        made = ops.experts(values, scale, self._here(routes), stack, None)
        return dp.reduce_scatter(made)[:count]

    def _exchange(self, x: Tensor, see: Seen, stack: ops.Experts) -> Tensor:
        """The same, 0 but in this rank's slice."""
        ep, mine = self.axes.ep, self._mine(len(x))
        values, scale, routes = see(Normed(x[mine]))
        self._count(routes, slice(None))
        values, top_k = ops.finish_norm(values, scale), self.spec.top_k
        slots = self._slots(routes).flatten()
        order = slots.argsort(stable=True)
        slots = slots[order]
        counts = (slots // self.num_slots).bincount(minlength=ep.size)
        ones = [1] * ep.size
        send, receive = torch.stack((counts, ep.all_to_all(counts, ones, ones))).tolist()
        rows = ep.all_to_all(values[order // top_k], send, receive)
        theirs = ep.all_to_all(slots % self.num_slots, send, receive)
        alone = ops.Routes(theirs[:, None], torch.ones(len(rows), 1, device=rows.device))
        made = ops.experts(rows, None, alone, stack._replace(total=0), None)
        back = torch.empty(len(order), x.shape[1], dtype=x.dtype, device=x.device)
        back[order] = ep.all_to_all(made, receive, send)
        total = torch.zeros_like(x)
        weighed = back.unflatten(0, (-1, top_k)).float() * routes.weights[..., None]
        total[mine] = weighed.sum(1).to(x.dtype)
        return total

    def _mine(self, count: int) -> slice:
        """This rank's slice of rows that `num_alike` ranks have."""
        size = -(-count // self.num_alike)
        start = min(self.axes.ep.rank % self.num_alike * size, count)
        return slice(start, min(start + size, count))

    def _slots(self, routes: ops.Routes) -> Tensor:
        """Where tokens go, counted through all ranks, [T, top_k] int32."""
        turns = torch.arange(len(routes.experts), device=self.table.device) % self.table.shape[1]
        return self.table[routes.experts.long(), turns[:, None]]

    def _here(self, routes: ops.Routes) -> ops.Routes:
        """With experts by their slots on this rank; those of others get a number that none here has."""
        own = self._slots(routes) - self.axes.ep.rank * self.num_slots
        held = (own >= 0) & (own < self.num_slots)
        return routes._replace(experts=torch.where(held, own, self.num_slots))

    def _count(self, routes: ops.Routes, mine: slice) -> None:
        if self.spreading.experts.interval is not None:
            chosen = routes.experts[mine].flatten().long()
            self.load.index_add_(0, chosen, torch.ones_like(chosen))


def _with(y: Tensor, shared: ops.Shared | None) -> Tensor:
    if shared is None:
        return y
    return y + (shared.values if shared.gate is None else shared.values * ops.act(shared.gate, "sigmoid"))
