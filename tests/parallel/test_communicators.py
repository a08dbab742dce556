"""Everything that exchanges tensors does the same: one test for all that this machine has."""

from collections.abc import Iterator

import pytest

from quire.parallel import shared_memory
from quire.parallel.mesh import Mesh
from tests.parallel.lives import LARGE
from tests.parallel.ranks import Ranks, expect

SIZES = [{"tp": 1}, {"tp": 2}, {"pp": 3}, {"tp": 4}]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    found = Ranks("tests.parallel.lives")
    yield found
    found.close()


@pytest.mark.parametrize("mesh", SIZES, ids=str)
def test_operations(ranks: Ranks, way: str, mesh: dict[str, int]) -> None:
    size = Mesh(**mesh).size
    expect(ranks.run("exchange", size, way=way, mesh=mesh, axes=["world"], large=LARGE), "well")


def test_axes_of_a_mesh(ranks: Ranks, way: str) -> None:
    mesh = {"pp": 2, "tp": 2}
    expect(ranks.run("exchange", 4, way=way, mesh=mesh, axes=["pp", "tp"], large=100), "well")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"tp": 8}, {"dp": 2, "pp": 2, "tp": 2}], ids=str)
def test_eight_ranks(ranks: Ranks, way: str, mesh: dict[str, int]) -> None:
    expect(ranks.run("exchange", 8, way=way, mesh=mesh, axes=["tp", "ep"], large=LARGE), "well")


def test_large_exchanges(ranks: Ranks, way: str) -> None:
    expect(ranks.run("around", 2, way=way, mesh={"tp": 2}), "well")


def test_every_half(ranks: Ranks, way: str) -> None:
    expect(ranks.run("special", 2, way=way, mesh={"tp": 2}), "well")


@pytest.mark.skipif(shared_memory.why_not(Mesh(tp=2)) is not None, reason="needs memory to share")
def test_two_machines(ranks: Ranks) -> None:
    expect(ranks.run("two_machines", 4), "well")


@pytest.mark.skipif(shared_memory.why_not(Mesh(tp=2)) is not None, reason="needs memory to share")
def test_recorded_steps(ranks: Ranks) -> None:
    found = ranks.run("replay", 3, way="shared memory", mesh={"tp": 3})
    expect(found[:2], "well")
    assert found[2] == "ended with -9"


@pytest.mark.parametrize("operation", ["all_reduce", "receive"])
def test_who_waits_for_the_dead_is_told(ranks: Ranks, way: str, operation: str) -> None:
    """By the connection that breaks, or by whoever watches the processes."""
    found = ranks.run("lose", 3, way=way, mesh={"tp": 3}, operation=operation, after="death")
    assert found == ["lost", "lost", "ended with -9"]


def test_who_waits_too_long_is_told(ranks: Ranks, way: str) -> None:
    found = ranks.run("lose", 3, way=way, mesh={"tp": 3}, operation="all_reduce", after="timeout")
    assert found == ["lost", "lost", "ended with -9"]
