"""Which rank holds which experts, so that all have about as much to do. Pure; knows no weights and moves none.

Experts that many tokens go to are held more than once. One slot a rank beyond what the experts need is nearly all that
there is to gain: with 256 experts of loads like 1 / k^0.8, the busiest of 32 ranks has 3.2 times the mean without them,
and 1.001 times with.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from quire.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Placement:
    """The expert in each slot of each rank, by its number in the network."""

    ranks: tuple[tuple[int, ...], ...]
    num_experts: int

    def replicas(self) -> tuple[tuple[int, ...], ...]:
        """By expert: the slots that hold it, counted through all ranks."""
        found: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(expert for rank in self.ranks for expert in rank):
            found[expert].append(slot)
        return tuple(map(tuple, found))

    def loads(self, load: Sequence[float]) -> list[float]:
        """Of each rank, if an expert's replicas share its load equally."""
        shares = [x / len(slots) for x, slots in zip(load, self.replicas(), strict=True)]
        return [sum(shares[expert] for expert in rank) for rank in self.ranks]


class Move(NamedTuple):
    """A copy of an expert: from a slot of one rank to a slot of another, or of the same."""

    giver: int
    source: int
    taker: int
    slot: int


def settled(new: Placement, old: Placement) -> Placement:
    """The same shares, each at the rank that has most of it, and in the slots where it is."""
    left, ranks = list(range(len(new.ranks))), []
    for here in old.ranks:
        best = max(left, key=lambda r: len(set(new.ranks[r]) & set(here)))
        left.remove(best)
        coming = list(new.ranks[best])
        slots = [coming.pop(coming.index(expert)) if expert in coming else None for expert in here]
        ranks.append(tuple(coming.pop(0) if expert is None else expert for expert in slots))
    return Placement(tuple(ranks), new.num_experts)


def moves(old: Placement, new: Placement) -> list[Move]:
    """What has to be copied to come from one placement to another of as many slots; those who have one take turns."""
    found, holders = list[Move](), old.replicas()
    size = len(old.ranks[0])
    for taker, (before, after) in enumerate(zip(old.ranks, new.ranks, strict=True)):
        for slot, (had, expert) in enumerate(zip(before, after, strict=True)):
            if had != expert:
                givers = holders[expert]
                own = [at for at in givers if at // size == taker]
                giver, source = divmod(own[0] if own else givers[len(found) % len(givers)], size)
                found.append(Move(giver, source, taker, slot))
    return found


def place(load: Sequence[float], num_ranks: int, slots_per_rank: int) -> Placement:
    """A placement for experts of these loads, measured or all the same; the same arguments give the same one.

    Slots beyond one for each expert go, one after the other, to the expert whose replicas have most to do. Then each
    replica, the busiest first, goes to the rank that has least to do, among those with a slot and without that expert.

    Raises:
        ConfigError: there are fewer slots than experts.
    """
    if num_ranks * slots_per_rank < len(load):
        raise ConfigError(
            f"{num_ranks} ranks of {slots_per_rank} slots cannot hold {len(load)} experts; "
            f"each needs {-(-len(load) // num_ranks)} slots or more"
        )
    counts = _replicate(load, num_ranks, num_ranks * slots_per_rank - len(load))
    shares = [(load[e] / n, e) for e, n in enumerate(counts) for _ in range(n)]
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for share, expert in sorted(shares, key=lambda one: (-one[0], one[1])):
        free = (r for r in range(num_ranks) if len(ranks[r]) < slots_per_rank)
        rank = min(free, key=lambda r: (expert in ranks[r], loads[r], r))
        ranks[rank].append(expert)
        loads[rank] += share
    return Placement(tuple(tuple(sorted(rank)) for rank in ranks), len(load))


def _replicate(load: Sequence[float], most: int, spare: int) -> list[int]:
    """How often each expert is held: once, and spare slots by load; on no more ranks than there are, unless all are."""
    counts = [1] * len(load)
    heap = [(most == 1, -x, e) for e, x in enumerate(load)]
    heapq.heapify(heap)
    for _ in range(spare if load else 0):
        expert = heap[0][2]
        counts[expert] += 1
        heapq.heapreplace(heap, (counts[expert] >= most, -load[expert] / counts[expert], expert))
    return counts
