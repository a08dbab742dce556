"""What layers are built from and loaded from. Layers pull their weights by their own names."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from quire.attention.base import Backend, Cache, Ragged
from quire.attention.groups import Layout
from quire.attention.sparse import Chosen
from quire.checkpoint.upload import Upload
from quire.kernels import ops
from quire.layers.rope import RopeTables
from quire.models.shard import WholeExperts
from quire.models.spec import Spec
from quire.parallel.axis import Axes
from quire.parallel.vocabulary import Vocabulary


class Weights(Protocol):
    """Where weights come from: a checkpoint, or anything that answers by our names."""

    def __contains__(self, name: str) -> bool: ...

    def tensor(self, name: str, *, shape: tuple[int, ...], rows: slice | None = None) -> Tensor:
        """The named tensor, which must have `shape`; with `rows`, only those of its rows."""


class Network(Protocol):
    """What a runner runs: a network over the paged cache."""

    @property
    def spec(self) -> Spec: ...

    @property
    def backend(self) -> Backend: ...

    @property
    def build(self) -> "Build": ...

    @property
    def axes(self) -> Axes:
        """Whose ranks compute it together."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Which tokens' logits this rank has."""

    def caches(self, pool: Tensor, states: Tensor | None = None, layout: Layout | None = None) -> list[Cache]:
        """Each layer's view of the memory; see `layer_caches`."""

    def __call__(self, token_ids: Tensor, step: Ragged, caches: Sequence[Cache]) -> Tensor:
        """token_ids [T] int64 -> hidden [T, dim], or of `step.wanted` [R, dim]."""

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, dim] -> [R, own] float32, of this rank's tokens."""


@dataclass(slots=True)
class Choice:
    """What the newest indexer has chosen, for the layers that follow without one of their own."""

    chosen: Chosen | None = None


@dataclass(slots=True)
class Spreading:
    """How the ranks of `axes.ep` compute experts of which each has some.

    Attributes:
        most_rows: tokens of the present step's largest part, where ranks along dp have different ones.
        between: what all ranks do before each step.
        idle: how a rank without tokens takes part in a step.
    """

    axes: Axes
    experts: WholeExperts
    most_rows: int = 0
    between: Callable[[], None] = lambda: None
    idle: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Build:
    """What every layer of a network shares."""

    dim: int
    dtype: torch.dtype
    device: torch.device
    backend: Backend
    ropes: RopeTables
    invariant: bool = False  # a row's result is the same bits whatever else is in its batch
    bits: int | None = None  # of quantized weights
    spreading: Spreading | None = None  # of whole experts
    upload: Upload = field(init=False)
    shared: dict[int, Any] = field(default_factory=dict)  # parts that several layers have in common
    choice: Choice = field(init=False, default_factory=Choice)

    def __post_init__(self) -> None:
        object.__setattr__(self, "upload", Upload(self.device))

    @property
    def in_chunks(self) -> bool:
        """Whether recurrences may be computed in chunks: they round, and differ by where a prompt was cut."""
        return self.dtype.itemsize < torch.float32.itemsize and not self.invariant

    def pack(self, weight: Tensor) -> Any:
        """A weight in the form of the fastest product that is good enough; see `ops.pack_linear`."""
        return ops.pack_linear(weight, self.invariant)

    def pull(self, weights: Weights, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A weight in the model's dtype (or `dtype`) on its device, in memory of its own."""
        tensor = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        self.fill(tensor, weights, name)
        return tensor

    def fill(self, destination: Tensor, weights: Weights, name: str) -> None:
        """The same into memory that is there, whose shape the weight must have: some rows of a larger one."""
        self.upload.copy(destination, weights.tensor(name, shape=tuple(destination.shape)))
