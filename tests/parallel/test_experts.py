"""Placements of experts: complete, within their slots, and balanced."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import ConfigError
from quire.parallel.experts import Placement, moves, place, settled

LOADS = st.lists(st.floats(0, 1e6), min_size=1, max_size=40)


def balance(placement: Placement, load: list[float]) -> float:
    """The busiest rank's load, of the mean."""
    loads = placement.loads(load)
    return max(loads) * len(loads) / sum(loads)


def zipf(num_experts: int = 256) -> list[float]:
    load = [1 / (k + 1) ** 0.8 for k in range(num_experts)]
    random.Random(0).shuffle(load)
    return load


@given(LOADS, st.integers(1, 9), st.integers(0, 3))
def test_every_expert_is_somewhere_and_every_slot_is_filled(
    load: list[float], num_ranks: int, spare: int
) -> None:
    slots = -(-len(load) // num_ranks) + spare
    placement = place(load, num_ranks, slots)
    assert len(placement.ranks) == num_ranks and {len(rank) for rank in placement.ranks} == {slots}
    replicas = placement.replicas()
    assert len(replicas) == len(load) and all(replicas)
    assert sorted(slot for found in replicas for slot in found) == list(range(num_ranks * slots))
    held = [expert for rank in placement.ranks for expert in rank]
    assert all(held[slot] == expert for expert, found in enumerate(replicas) for slot in found)
    assert sum(placement.loads(load)) == pytest.approx(sum(load))
    assert place(load, num_ranks, slots) == placement


@given(LOADS, st.integers(1, 9))
def test_with_one_more_slot_a_rank_no_replica_is_too_large_for_a_rank(
    load: list[float], num_ranks: int
) -> None:
    placement = place(load, num_ranks, -(-len(load) // num_ranks) + 1)
    largest = max(x / len(slots) for x, slots in zip(load, placement.replicas(), strict=True))
    assert largest <= sum(load) / num_ranks * (1 + 1e-9)


@pytest.mark.parametrize(("num_ranks", "packed"), [(8, 1.15), (16, 1.8), (32, 3.3)])
def test_one_more_slot_a_rank_balances_256_experts(num_ranks: int, packed: float) -> None:
    """Loads as 1 / k^0.8: in order, packed without spare slots, and with one a rank."""
    load, slots = zipf(), 256 // num_ranks
    in_order = Placement(tuple(tuple(range(r * slots, (r + 1) * slots)) for r in range(num_ranks)), 256)
    without, with_one = (balance(place(load, num_ranks, slots + more), load) for more in (0, 1))
    assert 1.01 < without <= min(packed, balance(in_order, load))
    assert with_one <= 1.01


def test_replicas_are_on_ranks_of_their_own() -> None:
    placement = place([100.0, 1.0, 1.0, 1.0], 4, 2)
    assert all(0 in rank for rank in placement.ranks)
    assert [len(slots) for slots in placement.replicas()] == [4, 2, 1, 1]


def test_too_few_slots_are_refused() -> None:
    with pytest.raises(ConfigError, match="each needs 3 slots"):
        place([1.0] * 9, 4, 2)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), min_size=1, max_size=40), st.integers(1, 6))
def test_moves_lead_from_one_placement_to_another(loads: list[tuple[float, float]], num_ranks: int) -> None:
    """From copies as they were before all of them; and what is there already stays where it is."""
    slots = -(-len(loads) // num_ranks) + 1
    old, wanted = (place(load, num_ranks, slots) for load in zip(*loads, strict=True))
    new = settled(wanted, old)
    assert sorted(map(sorted, new.ranks)) == sorted(map(sorted, wanted.ranks))
    held, found = [list(rank) for rank in old.ranks], moves(old, new)
    for move in found:
        held[move.taker][move.slot] = old.ranks[move.giver][move.source]
    assert held == [list(rank) for rank in new.ranks]
    assert settled(old, old) == old and moves(old, old) == []
