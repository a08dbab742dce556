"""Torch's process groups as communicators: gloo between CPUs and hosts, NCCL between GPUs.

They are made here one by one, without torch's default group, which is one for all of a process. A store only lets the
ranks find each other, under a prefix that names the group's generation, so that a group that was started again never
meets what is left of the one before. No objects travel, only tensors.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import (
    AllreduceOptions,
    AllToAllOptions,
    BroadcastOptions,
    PrefixStore,
    ProcessGroupGloo,
    ReduceScatterOptions,
    Store,
    Work,
)
from torch.nn.functional import pad

from quire.errors import PeerLost

MOST_PENDING = 8  # tensors that gloo is still sending
ONE_ROUND_BYTES = 1 << 16  # of a sum that all ranks make; of larger ones each makes a part


class ProcessGroup:
    """One of torch's, whose types say little about it. `device` is where tensors for barriers are.

    Gloo adds up numbers in an order that depends on where in a tensor they are, and rounds each time. So what it would
    sum is moved instead, and added here `in_order` of the ranks, in float32: results do not depend on the batch.
    """

    def __init__(self, group: Any, device: torch.device, *, in_order: bool):
        self.size, self.rank = group.size(), group.rank()
        self.is_repeatable = device.type == "cuda"  # what gloo does is no kernel
        self._group, self._device, self._in_order = group, device, in_order
        self._pending: deque[tuple[Work, Tensor]] = deque()

    def all_reduce(self, x: Tensor) -> Tensor:
        if not (self._in_order and x.is_floating_point()):
            with _peers():
                self._group.allreduce([x], AllreduceOptions()).wait()
            return x
        if x.nbytes <= ONE_ROUND_BYTES:
            return x.copy_(_added(self.all_gather(x.view(1, -1), 0)).view_as(x))
        even = pad(x.view(-1), (0, -x.numel() % self.size))
        return x.copy_(self.all_gather(self.reduce_scatter(even), 0)[: x.numel()].view_as(x))

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        found = x.new_empty((self.size, *x.shape))
        with _peers():
            self._group._allgather_base(found.view(-1), x.view(-1)).wait()
        return found.movedim(0, dim).flatten(dim, dim + 1).contiguous()

    def reduce_scatter(self, x: Tensor) -> Tensor:
        if self._in_order and x.is_floating_point():
            counts = [len(x) // self.size] * self.size
            return _added(self.all_to_all(x, counts, counts).unflatten(0, (self.size, -1)))
        out = x.new_empty((len(x) // self.size, *x.shape[1:]))
        with _peers():
            self._group._reduce_scatter_base(out, x, ReduceScatterOptions()).wait()
        return out

    def all_to_all(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Tensor:
        out = x.new_empty((sum(recv), *x.shape[1:]))
        with _peers():
            self._group.alltoall_base(out, x, list(recv), list(send), AllToAllOptions()).wait()
        return out

    def send(self, x: Tensor, to: int) -> None:
        """Returns at once, unless many are on their way. On a GPU, once the stream has it."""
        with _peers():
            work = self._group.send([x], to, 0)
            if x.is_cuda:
                work.wait()
                return
            self._pending.append((work, x))
            if len(self._pending) > MOST_PENDING:
                self._pending.popleft()[0].wait()

    def receive(self, x: Tensor, source: int) -> None:
        with _peers():
            self._group.recv([x], source, 0).wait()

    def broadcast(self, x: Tensor, source: int) -> None:
        options = BroadcastOptions()
        options.rootRank = source
        with _peers():
            self._group.broadcast([x], options).wait()

    def barrier(self) -> None:
        here = torch.ones(1, dtype=torch.int32, device=self._device)
        self.all_reduce(here)
        here.tolist()  # waits for a GPU, too

    def check(self) -> None:
        """Operations raise what they find, or, on GPUs, NCCL's watchdog ends the process."""

    def close(self) -> None:
        """At once, also if others are gone: what NCCL does otherwise when it is freed would wait for them."""
        if self._device.type == "cuda":
            self._group.abort()


def _added(parts: Tensor) -> Tensor:
    """[ranks, ...] -> [...]"""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part
    return total.to(parts.dtype)


@contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(
            f"another process of the group died or did not answer in time ({error}); the group has to be "
            "started again"
        ) from error


def gloo(store: Store, name: str, rank: int, size: int, *, timeout_s: float, host: str) -> ProcessGroup:
    """Over TCP between CPUs, listening at `host`, an address of this machine.

    Raises:
        PeerLost: not all ranks came in time.
    """
    kind: Any = ProcessGroupGloo
    options = kind._Options()
    options._timeout = timedelta(seconds=timeout_s)
    options._devices = [kind.create_device(hostname=host)]
    with _peers():
        group = kind(PrefixStore(name, store), rank, size, options)
    return ProcessGroup(group, torch.device("cpu"), in_order=True)


def nccl(
    store: Store, name: str, rank: int, size: int, *, timeout_s: float, device: torch.device
) -> ProcessGroup:
    """Between GPUs, of which `device` is this rank's. A rank that waits for longer than the timeout is ended.

    Raises:
        PeerLost: not all ranks came in time.
    """
    from torch.distributed import ProcessGroupNCCL  # only in builds for GPUs

    os.environ["NCCL_NVLS_ENABLE"] = "0"  # no multicast, which can put GPUs that others share out of service
    options: Any = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    with _peers(), torch.cuda.device(device):
        group = ProcessGroupNCCL(PrefixStore(name, store), rank, size, options)
        found = ProcessGroup(group, device, in_order=False)
        found.barrier()  # NCCL connects at the first operation, which no recording of a step may have to do
    return found
