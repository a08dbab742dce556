"""The processes of a group as a grid: which of them share an axis. Pure; knows no tensors and no transport."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import prod
from typing import NamedTuple

from quire.errors import ConfigError

DIMENSIONS = ("dp", "pp", "tp", "cp")
SPANS = {  # an axis's name -> the dimensions that it runs over
    **{name: (name,) for name in ("dp", "pp", "cp")},
    "tp": ("tp", "cp"),  # ranks along cp have heads of their own too
    "ep": ("dp", "tp", "cp"),  # experts are spread over all that share a stage
    "world": DIMENSIONS,
}


class Place(NamedTuple):
    """A rank's coordinates."""

    dp: int
    pp: int
    tp: int
    cp: int


@dataclass(frozen=True, slots=True)
class Mesh:
    """Sizes of a group's dimensions: data, pipeline, tensor and context parallel. Ranks count up along cp first.

    Ranks with the same heads of keys are neighbours (layers/shards.py), and those along cp share out their positions.

    Raises:
        ConfigError: a size is below one.
    """

    dp: int = 1
    pp: int = 1
    tp: int = 1
    cp: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            size = getattr(self, field.name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ConfigError(f"{field.name} of a mesh is {size!r}; it must be a whole number from 1 on")

    @property
    def sizes(self) -> Place:
        return Place(self.dp, self.pp, self.tp, self.cp)

    @property
    def size(self) -> int:
        return prod(self.sizes)

    def coordinates(self, rank: int) -> Place:
        """Where a rank is.

        Raises:
            ConfigError: the mesh has no such rank.
        """
        if not 0 <= rank < self.size:
            raise ConfigError(
                f"rank is {rank}; a mesh of {self.size} processes has ranks 0 to {self.size - 1}"
            )
        place = []
        for size in reversed(self.sizes):
            rank, coordinate = divmod(rank, size)
            place.append(coordinate)
        return Place(*reversed(place))

    def rank(self, place: Place) -> int:
        """The rank that is there: the inverse of `coordinates`."""
        found = 0
        for size, coordinate in zip(self.sizes, place, strict=True):
            found = found * size + coordinate
        return found

    def peers(self, axis: str, rank: int) -> tuple[int, ...]:
        """The ranks along an axis (one of SPANS) that `rank` is on, itself among them, in the order of the axis.

        Raises:
            ConfigError: there is no such axis, or no such rank.
        """
        if axis not in SPANS:
            raise ConfigError(f"a mesh has no axis {axis!r}; it has {', '.join(SPANS)}")
        here = self.coordinates(rank)
        fixed = [i for i, name in enumerate(DIMENSIONS) if name not in SPANS[axis]]
        places = map(self.coordinates, range(self.size))
        return tuple(self.rank(place) for place in places if all(place[i] == here[i] for i in fixed))

    def lines(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every (axis, peers) of more than one rank, in an order that all processes agree on."""
        for axis in SPANS:
            found = dict.fromkeys(self.peers(axis, rank) for rank in range(self.size))
            yield from ((axis, peers) for peers in found if len(peers) > 1)
