"""Memory that the processes of one machine share, as a communicator of CPU tensors (kernels/cpu/exchange.cpp).

The memory is a file without a name, which whoever starts the processes makes and hands to each as a descriptor. So
nothing is left of it when they are gone, however they went.
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Collection, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from quire.errors import ConfigError, PeerLost
from quire.kernels.cpu.calls import keep, kernel
from quire.kernels.cpu.native import isa, load
from quire.parallel.mesh import Mesh

SLOT_BYTES = 1 << 18  # of a round of sums; larger tensors go in several
RING_BYTES = 1 << 23  # between two ranks: what a sender can be ahead by
MOST_RANKS = 64  # of an axis, as in exchange.cpp
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int32: 3, torch.int64: 4}


def why_not(mesh: Mesh) -> str | None:
    """Why ranks of this mesh cannot exchange tensors through shared memory here, or None."""
    if sys.platform != "linux":
        return f"files without names are Linux's, and this is {sys.platform}"
    if mesh.size > MOST_RANKS:
        return f"an axis has up to {mesh.size} ranks, and at most {MOST_RANKS} share memory"
    library, reason = load()
    if library is None:
        return reason
    try:
        library["quire_exchange"]
    except AttributeError:
        return "the C++ kernels were built before those that exchange tensors; reinstall quire"
    return None


def make_segment() -> int:
    """A descriptor of memory to be shared, as large as those who open it need. The caller closes it."""
    return os.memfd_create("quire", os.MFD_CLOEXEC)


class Segment:
    """Shared memory with a region for every line of a mesh whose ranks are all on this machine.

    Raises:
        ConfigError: there is none here; the message says why.
    """

    def __init__(self, descriptor: int, mesh: Mesh, local: Collection[int]):
        reason, (library, _) = why_not(mesh), load()
        if reason is not None or library is None:
            raise ConfigError(f"processes cannot share memory: {reason}")
        num_bytes = library.quire_region_bytes
        num_bytes.argtypes, num_bytes.restype = (ctypes.c_int64,) * 3, ctypes.c_int64
        self.offsets: dict[tuple[int, ...], int] = {}
        end = 0
        for _, peers in mesh.lines():
            if peers not in self.offsets and set(peers) <= set(local):
                self.offsets[peers] = end
                end += num_bytes(len(peers), SLOT_BYTES, RING_BYTES)
        size = max(end, mmap.PAGESIZE)
        os.ftruncate(descriptor, size)  # to the same by each rank; there are no pages before they are used
        self._memory = np.frombuffer(mmap.mmap(descriptor, size), np.uint8)
        words = self._memory.view(np.uint64)
        self.poisons = {peers: words[start // 8 :][:1] for peers, start in self.offsets.items()}

    def address(self, peers: tuple[int, ...]) -> int:
        """Of the region that these ranks share."""
        return self._memory.ctypes.data + self.offsets[peers]

    def poison(self) -> None:
        """Have all operations of all ranks fail from now on, those that are waiting among them."""
        for word in self.poisons.values():
            word[0] = 1


class SharedMemory:
    """Sums are in the order of ranks, in float32: the same bits on all ranks, every time.

    Attributes:
        place: what every kernel is told first (exchange.h).
    """

    is_repeatable = True

    def __init__(self, segment: Segment, peers: tuple[int, ...], rank: int, *, timeout_s: float):
        self.size, self.rank = len(peers), peers.index(rank)
        self._segment, self._poison = segment, segment.poisons[peers]
        where = (segment.address(peers), SLOT_BYTES, RING_BYTES, int(timeout_s * 1e9))
        self.place = (self.rank, self.size, *where)
        self._reduce, self._gather, self._exchange = (
            kernel(f"quire_{name}") for name in ("all_reduce", "all_gather", "exchange")
        )

    def all_reduce(self, x: Tensor) -> Tensor:
        self._sum(x, x, 0, x.numel())
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        shape = list(x.shape)
        shape[dim] *= self.size
        out = torch.empty(shape, dtype=x.dtype)
        run_bytes = prod(x.shape[dim:]) * x.dtype.itemsize
        self._gather(*self.place, x.data_ptr(), out.data_ptr(), x.nbytes, run_bytes)
        self.check()
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        out = torch.empty((len(x) // self.size, *x.shape[1:]), dtype=x.dtype)
        self._sum(x, out, self.rank * out.numel(), (self.rank + 1) * out.numel())
        return out

    def all_to_all(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Tensor:
        out = torch.empty((sum(recv), *x.shape[1:]), dtype=x.dtype)
        row_bytes = prod(x.shape[1:]) * x.dtype.itemsize
        self._move(x, out, [n * row_bytes for n in send], [n * row_bytes for n in recv])
        return out

    def send(self, x: Tensor, to: int) -> None:
        """Waits if the other rank is behind by more than RING_BYTES."""
        self._move(x, x, self._only(to, x.nbytes), self._only(to, 0))

    def receive(self, x: Tensor, source: int) -> None:
        self._move(x, x, self._only(source, 0), self._only(source, x.nbytes))

    def broadcast(self, x: Tensor, source: int) -> None:
        if self.rank != source:
            return self.receive(x, source)
        for to in range(self.size):
            if to != source:
                self.send(x, to)
        return None

    def barrier(self) -> None:
        nothing = torch.empty(0)
        self._sum(nothing, nothing, 0, 0)

    def check(self) -> None:
        if self._poison[0]:
            self._segment.poison()  # the other axes' regions, too
            raise PeerLost(
                "another process of the group died or did not answer in time; the group has to be started again"
            )

    def close(self) -> None:
        """The memory is free when nothing refers to it."""

    def _sum(self, x: Tensor, out: Tensor, begin: int, end: int) -> None:
        self._reduce(
            *(isa(), torch.get_num_threads(), TYPES[x.dtype], *self.place),
            *(x.data_ptr(), out.data_ptr(), x.numel(), begin, end),
        )
        self.check()

    def _only(self, rank: int, num_bytes: int) -> list[int]:
        return [num_bytes if r == rank else 0 for r in range(self.size)]

    def _move(self, x: Tensor, out: Tensor, send: list[int], receive: list[int]) -> None:
        counts = np.array((send, receive), np.int64)
        keep(counts)
        address = counts.ctypes.data
        self._exchange(*self.place, x.data_ptr(), out.data_ptr(), address, address + counts.strides[0])
        self.check()
