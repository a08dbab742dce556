"""One dimension of a mesh, as layers see it: at size 1 every operation is the identity. Knows no transport.

All ranks of an axis call the same operations in the same order, with tensors of the same shapes and dtypes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from quire.errors import PeerLost

SUMMED = frozenset((torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64))


class Communicator(Protocol):
    """A way to exchange contiguous tensors, which are not empty, among the ranks of one axis.

    Attributes:
        is_repeatable: whether operations can be part of a step that is computed again by one call: a recording on CPUs,
            a graph on GPUs.

    Raises:
        PeerLost: (all operations) another rank died or did not answer in time; its results are not to be used.
    """

    size: int
    rank: int
    is_repeatable: bool

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum, the same bits on all ranks, perhaps in x itself."""

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """Everyone's x one after the other along a dimension."""

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """This rank's part [n / size, ...] of the sum of everyone's x [n, ...]."""

    def all_to_all(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Tensor:
        """x may be empty here."""

    def send(self, x: Tensor, to: int) -> None:
        """Need not wait for the other rank, though a GPU's stream may; x is not written to afterwards."""

    def receive(self, x: Tensor, source: int) -> None:
        """x becomes what was sent."""

    def broadcast(self, x: Tensor, source: int) -> None:
        """x becomes the source's."""

    def barrier(self) -> None:
        """Until all are here."""

    def check(self) -> None:
        """Raise what an operation found that could not raise it, being part of a recorded step."""

    def close(self) -> None:
        """Let go of the other ranks, which may be gone. Recorded steps must be gone: NCCL waits for its graphs."""


class Axis:
    """Ranks that compute something together. `Axis()` is one alone.

    Attributes:
        size: how many there are.
        rank: which of them this process is; ranks in arguments count in the axis, too.
    """

    __slots__ = ("communicator", "rank", "size")

    def __init__(self, communicator: Communicator | None = None):
        self.communicator = communicator
        self.size = 1 if communicator is None else communicator.size
        self.rank = 0 if communicator is None else communicator.rank

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks, the same bits on each. x is used up: the sum may be in it.

        Raises:
            TypeError: sums of this dtype are not made; SUMMED has those that are.
        """
        _check_sum(x)
        if self.communicator is None or not x.numel():
            return x
        return self.communicator.all_reduce(x.contiguous())

    def all_gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """[..., n, ...] -> [..., size * n, ...], in the order of ranks; contiguous."""
        if self.communicator is None:
            return x
        dim %= x.dim()
        if not x.numel():
            return x.new_empty([n * self.size if i == dim else n for i, n in enumerate(x.shape)])
        return self.communicator.all_gather(_movable(x), dim).view(x.dtype)

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        """[..., size * n, ...] -> [..., n, ...]: this rank's part of the sum.

        Raises:
            TypeError: sums of this dtype are not made; SUMMED has those that are.
            ValueError: the dimension cannot be cut into so many equal parts.
        """
        _check_sum(x)
        if self.communicator is None:
            return x
        if x.shape[dim] % self.size:
            raise ValueError(f"{x.shape[dim]} rows cannot be cut into {self.size} equal parts; pad them")
        if not x.numel():
            return x.narrow(dim, 0, x.shape[dim] // self.size)
        first = x.movedim(dim, 0).contiguous()
        return self.communicator.reduce_scatter(first).movedim(0, dim)

    def all_to_all(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Tensor:
        """x's rows, `send[i]` of them to rank i, one after the other -> rows from all ranks, `recv[i]` from rank i.

        Raises:
            ValueError: the counts are not those of this axis, or of x.
        """
        if len(send) != self.size or len(recv) != self.size or sum(send) != len(x):
            raise ValueError(
                f"{len(x)} rows are sent as {list(send)}, received as {list(recv)} by {self.size} ranks"
            )
        if self.communicator is None:
            return x
        if not prod(x.shape[1:]):
            return x.new_empty((sum(recv), *x.shape[1:]))
        return self.communicator.all_to_all(_movable(x), send, recv).view(x.dtype)

    def send(self, x: Tensor, to: int) -> None:
        """Hand x, which must not be changed afterwards, to another rank; the same bytes are received in order."""
        if x.numel():
            self._other(to).send(_movable(x), to)

    def receive(self, x: Tensor, source: int) -> Tensor:
        """What another rank sent, which had x's shape and dtype: in x itself if that is contiguous."""
        x = x.contiguous()
        if x.numel():
            self._other(source).receive(_movable(x), source)
        return x

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """The source's x, in x itself if that is contiguous."""
        if self.communicator is None or not x.numel():
            return x
        x = x.contiguous()
        self.communicator.broadcast(_movable(x), source)
        return x

    def barrier(self) -> None:
        """Until all ranks are here."""
        if self.communicator is not None:
            self.communicator.barrier()

    def check(self) -> None:
        """To be called before the results of a recorded step are used.

        Raises:
            PeerLost: another rank was lost meanwhile, and the step's results mean nothing.
        """
        if self.communicator is not None:
            self.communicator.check()

    @property
    def is_repeatable(self) -> bool:
        """See `Communicator`."""
        return self.communicator is None or self.communicator.is_repeatable

    def close(self) -> None:
        """See `Communicator`."""
        if self.communicator is not None:
            self.communicator.close()

    def _other(self, rank: int) -> Communicator:
        if self.communicator is None or rank == self.rank or not 0 <= rank < self.size:
            raise ValueError(
                f"rank {self.rank} of {self.size} has no other rank {rank} to exchange tensors with"
            )
        return self.communicator


@dataclass(frozen=True, slots=True)
class Axes:
    """A process's axes, by their names (`Mesh`); of size 1 unless they were made. Equal ones are one object."""

    dp: Axis = field(default_factory=Axis)
    pp: Axis = field(default_factory=Axis)
    cp: Axis = field(default_factory=Axis)
    tp: Axis = field(default_factory=Axis)
    ep: Axis = field(default_factory=Axis)
    world: Axis = field(default_factory=Axis)

    def check(self) -> None:
        """To be called before the results of a recorded step are used.

        Raises:
            PeerLost: another rank was lost meanwhile, and the step's results mean nothing.
        """
        for axis in self._all():
            axis.check()

    def close(self) -> None:
        """Let go of the other ranks, after everything that was recorded with them."""
        for axis in set(self._all()):
            axis.close()

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the network's end, and samples."""
        return self.pp.rank == self.pp.size - 1

    @property
    def are_repeatable(self) -> bool:
        """Whether all operations can be part of a step that is computed again by one call."""
        return all(axis.is_repeatable for axis in self._all())

    def _all(self) -> tuple[Axis, ...]:
        return self.dp, self.pp, self.cp, self.tp, self.ep, self.world

    def most(self, number: int, device: torch.device) -> int:
        """The greatest of all ranks' numbers; waits for all."""
        if self.world.size == 1:
            return number
        return int(self.world.all_gather(torch.tensor([number], device=device)).max())

    def splits(self, error: Exception) -> bool:
        """Whether other ranks may not have met this error, as of memory: then no rank may go on as if all had."""
        return self.world.size > 1 and isinstance(error, RuntimeError | MemoryError | PeerLost)


def _check_sum(x: Tensor) -> None:
    if x.dtype not in SUMMED:
        raise TypeError(f"sums of {x.dtype} are not made; use one of {', '.join(sorted(map(str, SUMMED)))}")


def _movable(x: Tensor) -> Tensor:
    """x as transports take it, which know no numbers of 8 bits: those are moved as bytes."""
    x = x.contiguous()
    return x.view(torch.uint8) if x.dtype.itemsize == 1 and x.is_floating_point() else x
