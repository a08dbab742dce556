"""The vocabulary as ranks share it out: each has the logits of some tokens. At size 1, of all of them."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from quire.parallel.axis import Axis


class Vocabulary:
    """Tensors that ranks have of their own tokens, [R, own] in their order, and what all of them make of these.

    Attributes:
        size: how many tokens there are.
        share: how many a rank has, the last one fewer.
        own: this rank's.
    """

    __slots__ = ("axis", "own", "share", "size")

    def __init__(self, size: int, share: int | None = None, axis: Axis | None = None):
        """`axis`: whose ranks share it out."""
        self.size, self.share, self.axis = size, share or size, axis or Axis()
        first = self.axis.rank * self.share
        self.own = range(first, min(first + self.share, size))

    def gather(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """x [R, own] of each rank -> [R, size]."""
        return self._side_by_side(x, self.share, fill)[:, : self.size]

    def likeliest(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k greatest of everybody's x [R, own], in their order, and their tokens: [R, k] each."""
        values, tokens = x.topk(min(k, x.shape[1]))
        if self.axis.size == 1:
            return values, tokens
        each = min(k, self.share)
        best = self._side_by_side(values, each, -torch.inf).topk(k)
        return best.values, self._side_by_side(tokens + self.own.start, each, 0).gather(1, best.indices)

    def greatest(self, x: Tensor) -> Tensor:
        """The greatest of everybody's x [R]; NaN if one is."""
        return self._all(x).amax(0)

    def total(self, x: Tensor) -> Tensor:
        """The sum of everybody's x [R], in the order of ranks."""
        return self._all(x).sum(0, dtype=x.dtype)

    def best(self, scores: Tensor, tokens: Tensor) -> Tensor:
        """Of everybody's tokens [R] int64 that with the greatest of their scores [R], the first of equal ones."""
        chosen = self._all(scores).max(0).indices
        return self._all(tokens).gather(0, chosen[None])[0]

    def _all(self, x: Tensor) -> Tensor:
        return self.axis.all_gather(x[None])

    def _side_by_side(self, x: Tensor, width: int, fill: float) -> Tensor:
        """x of each rank, filled up to `width` columns."""
        return self.axis.all_gather(
            pad(x, (0, width - x.shape[1]), value=fill) if x.shape[1] < width else x, 1
        )
