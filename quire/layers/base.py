"""What layers are built from and loaded from. Layers pull their weights by their own names."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from quire.attention.base import Backend
from quire.kernels import ops
from quire.layers.rope import RopeTables


class Weights(Protocol):
    """Where weights come from: a checkpoint, or anything that answers by our names."""

    def __contains__(self, name: str) -> bool: ...

    def tensor(self, name: str, *, shape: tuple[int, ...], rows: slice | None = None) -> Tensor:
        """The named tensor, which must have `shape`; with `rows`, only those of its rows."""


@dataclass(frozen=True, slots=True)
class Build:
    """What every layer of a network shares."""

    dim: int
    dtype: torch.dtype
    device: torch.device
    backend: Backend
    ropes: RopeTables
    invariant: bool = False  # a row's result is the same bits whatever else is in its batch

    def pack(self, weight: Tensor) -> Any:
        """A weight in the form of the fastest product that is good enough; see `ops.pack_linear`."""
        return ops.pack_linear(weight, self.invariant)

    def pull(self, weights: Weights, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A weight in the model's dtype (or `dtype`) on its device, in memory of its own."""
        tensor = weights.tensor(name, shape=shape)
        return tensor.to(self.device, dtype or self.dtype, copy=True).contiguous()
