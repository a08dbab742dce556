"""Meshes: who shares which axis."""

import pytest

from quire.errors import ConfigError
from quire.parallel.mesh import DIMENSIONS, SPANS, Mesh, Place

MESHES = (Mesh(), Mesh(tp=4), Mesh(pp=2, tp=2), Mesh(dp=2, pp=3, cp=2, tp=4), Mesh(dp=3, cp=2))


def test_cp_varies_fastest_and_dp_slowest() -> None:
    mesh = Mesh(dp=2, pp=2, cp=2, tp=2)
    assert mesh.coordinates(1) == Place(0, 0, 0, 1)
    assert mesh.coordinates(2) == Place(0, 0, 1, 0)
    assert mesh.coordinates(4) == Place(0, 1, 0, 0)
    assert mesh.coordinates(8) == Place(1, 0, 0, 0)
    assert mesh.peers("pp", 3) == (3, 7)
    assert mesh.peers("cp", 3) == (2, 3) and mesh.peers("tp", 3) == (0, 1, 2, 3)
    assert mesh.peers("ep", 4) == (4, 5, 6, 7, 12, 13, 14, 15)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_axes_cut_the_ranks_into_equal_parts(mesh: Mesh) -> None:
    for axis, dimensions in SPANS.items():
        for rank in range(mesh.size):
            peers = mesh.peers(axis, rank)
            assert rank in peers and all(mesh.peers(axis, peer) == peers for peer in peers)
            others = {
                tuple(c for c, n in zip(mesh.coordinates(p), DIMENSIONS, strict=True) if n not in dimensions)
                for p in peers
            }
            assert len(others) == 1 and list(peers) == sorted(peers)
    assert {mesh.rank(mesh.coordinates(rank)) for rank in range(mesh.size)} == set(range(mesh.size))
    assert mesh.peers("world", 0) == tuple(range(mesh.size))


def test_sizes_of_axes() -> None:
    mesh = Mesh(dp=2, pp=3, cp=2, tp=4)
    sizes = {axis: len(mesh.peers(axis, 17)) for axis in SPANS}
    assert sizes == {"dp": 2, "pp": 3, "cp": 2, "tp": 8, "ep": 16, "world": 48}


@pytest.mark.parametrize("size", [0, -1, 1.0, True])
def test_what_is_no_size_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match="pp of a mesh"):
        Mesh(pp=size)


def test_what_is_not_in_a_mesh_is_refused() -> None:
    with pytest.raises(ConfigError, match="ranks 0 to 3"):
        Mesh(tp=4).coordinates(4)
    with pytest.raises(ConfigError, match="no axis 'sp'"):
        Mesh().peers("sp", 0)
