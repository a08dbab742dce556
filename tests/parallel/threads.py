"""Ranks as threads of one process: the least that a communicator can be."""

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from quire.parallel.axis import Axes, Axis
from quire.parallel.mesh import SPANS, Mesh

PATIENCE_S = 60


class Together:
    """What the threads have in common."""

    def __init__(self, size: int):
        self.size, self.given = size, [torch.empty(0)] * size
        self.sent: dict[tuple[int, int], SimpleQueue[Tensor]] = defaultdict(SimpleQueue)
        self.barrier = threading.Barrier(size, timeout=PATIENCE_S)


class Thread:
    """A communicator. What everyone gives lies in a list until all have taken it."""

    is_repeatable = False

    def __init__(self, together: Together, rank: int):
        self.together, self.size, self.rank = together, together.size, rank

    def _all(self, x: Tensor) -> list[Tensor]:
        self.together.given[self.rank] = x.clone()
        self.together.barrier.wait()
        found = list(self.together.given)
        self.together.barrier.wait()
        return found

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._all(x)).sum(0)

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return torch.cat(self._all(x), dim)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return torch.stack(self._all(x)).sum(0).chunk(self.size)[self.rank]

    def all_to_all(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Tensor:
        parts = self._all(torch.tensor(send)), self._all(x)
        found = [x[sum(n[: self.rank]) :][: n[self.rank]] for n, x in zip(*parts, strict=True)]
        assert [len(part) for part in found] == list(recv)
        return torch.cat(found)

    def send(self, x: Tensor, to: int) -> None:
        self.together.sent[self.rank, to].put(x.clone())

    def receive(self, x: Tensor, source: int) -> None:
        x.copy_(self.together.sent[source, self.rank].get(timeout=PATIENCE_S))

    def broadcast(self, x: Tensor, source: int) -> None:
        x.copy_(self._all(x)[source])

    def close(self) -> None:
        pass

    def barrier(self) -> None:
        self.together.barrier.wait()

    def check(self) -> None:
        """Nobody is ever lost."""


def in_ranks(size: int, compute: Callable[[Axis], Any]) -> list[Any]:
    """What each of `size` ranks computes."""
    return in_mesh(Mesh(tp=size), lambda axes: compute(axes.world))


def in_mesh(mesh: Mesh, compute: Callable[[Axes], Any]) -> list[Any]:
    """What each rank of a mesh computes."""
    lines = {peers: Together(len(peers)) for _, peers in mesh.lines()}

    def axis(peers: tuple[int, ...], rank: int) -> Axis:
        return Axis(Thread(lines[peers], peers.index(rank))) if len(peers) > 1 else Axis()

    def one(rank: int) -> Any:
        try:
            return compute(Axes(**{name: axis(mesh.peers(name, rank), rank) for name in SPANS}))
        except BaseException:
            for together in lines.values():  # the others wait for this one
                together.barrier.abort()
            raise

    with ThreadPoolExecutor(mesh.size) as pool:
        return list(pool.map(one, range(mesh.size)))
