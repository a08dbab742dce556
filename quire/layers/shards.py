"""A checkpoint as one of several ranks reads it: of each parameter, what its part has (models/shard.py)."""

import torch
from torch import Tensor

from quire.layers.base import Weights
from quire.models.parameters import parameter_shapes
from quire.models.shard import pieces
from quire.models.spec import Decoder


class Shards:
    """Weights of which rank `rank` of `size` reads its own; asked for by the shapes of its part.

    Where several ranks have the same part, as of heads of keys that are fewer than ranks, neighbours do.
    """

    def __init__(self, weights: Weights, whole: Decoder, size: int, rank: int):
        self.weights, self.size, self.rank = weights, size, rank
        self.shapes, self.pieces = dict(parameter_shapes(whole)), dict(pieces(whole))

    def __contains__(self, name: str) -> bool:
        return name in self.weights

    def tensor(self, name: str, *, shape: tuple[int, ...], rows: slice | None = None) -> Tensor:
        """This rank's part, which must have `shape`; with `rows`, only those of it."""
        whole = self.shapes[name]
        if whole == tuple(shape):
            return self.weights.tensor(name, shape=shape, rows=rows)
        if len(whole) != len(shape):
            raise ValueError(f"{name} has {len(whole)} dimensions, and {len(shape)} are asked for")
        dim = next(i for i, (a, b) in enumerate(zip(whole, shape, strict=True)) if a != b)
        found = self._rows(name, whole, shape[0]) if dim == 0 else self._columns(name, whole, dim, shape[dim])
        return found if rows is None else found[rows]

    def _rows(self, name: str, whole: tuple[int, ...], count: int) -> Tensor:
        """Only these are read. Those past the end of a vocabulary are 0."""
        found, start = [], 0
        sizes = self.pieces.get(name, (whole[0],))
        for size in sizes:
            own = count if len(sizes) == 1 else size // self.size
            first = start + self._index(size, own) * own
            last = min(first + own, whole[0])
            found.append(self.weights.tensor(name, shape=whole, rows=slice(min(first, last), last)))
            start += size
        rows = found[0] if len(found) == 1 else torch.cat(found)
        if len(rows) == count:
            return rows
        return torch.cat((rows, rows.new_zeros(count - len(rows), *whole[1:])))

    def _columns(self, name: str, whole: tuple[int, ...], dim: int, count: int) -> Tensor:
        found = self.weights.tensor(name, shape=whole)
        return found.narrow(dim, self._index(whole[dim], count) * count, count)

    def _index(self, size: int, own: int) -> int:
        """Which of the parts of `own` rows or columns is this rank's."""
        return self.rank * -(-size // own) // self.size
