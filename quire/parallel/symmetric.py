"""Small sums between the GPUs of one machine, which read each other's memory (torch's symmetric memory).

Everything else goes to NCCL. Multicast, by which switches add up, is never used, since it can put GPUs that others
share out of service; torch would set it up while ranks meet, and is told not to.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store
from torch.distributed import ProcessGroup as TorchGroup

from quire.parallel.process_groups import ProcessGroup

DTYPES = frozenset((torch.bfloat16, torch.float32))
ONE_SHOT_BYTES = 1 << 17  # every rank reads all of the others' numbers
TWO_SHOT_BYTES = 1 << 20  # every rank adds up a part, and reads the others' sums
ALIGNED = 16  # bytes that kernels read at once


def why_not(
    device: torch.device, others: Sequence[int], meetings: Sequence[int], *, one_machine: bool
) -> str | None:
    """Why ranks whose GPUs have these numbers (`device` is one of them) cannot add up so, or None.

    `meetings`: how many such groups each rank's process has been in.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it needs NVIDIA's GPUs, and the device is {device}"
    if not one_machine:
        return "the ranks are on several machines"
    if len(set(others)) < len(others):
        return f"ranks do not see each other's GPUs: theirs are number {', '.join(map(str, others))}"
    if len(set(meetings)) > 1:  # torch counts them, and would wait for ranks that have had as many
        return "a process of them has had another engine whose ranks used it"
    far = [i for i in others if i != device.index and not torch.cuda.can_device_access_peer(device.index, i)]
    return f"GPU {device.index} cannot read the memory of {', '.join(map(str, far))}" if far else None


def symmetric(
    group: ProcessGroup, store: Store, name: str, device: torch.device, *, one_machine: bool
) -> "tuple[Symmetric | None, str]":
    """The same ranks with fast small sums; or None, on all of them, and one's reason."""
    mine = torch.tensor([[device.index, Symmetric.meetings]], device=device)
    reason = why_not(device, *group.all_gather(mine, 0).T.tolist(), one_machine=one_machine)
    if not _all(group, reason is None, device):
        return None, reason or "another rank cannot"
    try:
        with torch.cuda.device(device):  # whose memory torch's kernels take it to be
            found = Symmetric(group, store, name, device)
            reason = _error(found, device)
    except RuntimeError as error:
        reason = str(error)
    return (found, "") if _all(group, reason is None, device) else (None, reason or "another rank cannot")


def _all(group: ProcessGroup, able: bool, device: torch.device) -> bool:
    return int(group.all_reduce(torch.tensor([int(able)], device=device))) == group.size


def _error(found: "Symmetric", device: torch.device) -> str | None:
    """What is wrong with sums of either kind, which are tried once."""
    for num_bytes in (ONE_SHOT_BYTES, TWO_SHOT_BYTES):
        mine = torch.full((num_bytes // 2,), found.rank + 1.0, dtype=torch.bfloat16, device=device)
        if not (found.all_reduce(mine) == found.size * (found.size + 1) / 2).all():
            return f"a sum of {num_bytes} bytes is wrong"
    return None


class Symmetric:
    """NCCL's operations, and sums of up to TWO_SHOT_BYTES through memory that all ranks have mapped."""

    is_repeatable = True
    meetings = 0  # of this process

    def __init__(self, group: ProcessGroup, store: Store, name: str, device: torch.device):
        from torch._C import _distributed_c10d  # not in all builds

        c10d: Any = _distributed_c10d

        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        self.size, self.rank = group.size, group.rank
        self._name = f"quire/{name}/{self.meetings}"  # torch remembers those that a process has had
        Symmetric.meetings += 1
        store = PrefixStore(f"symmetric/{name}", store)
        registered, memory = TorchGroup(store, self.rank, self.size), c10d._SymmetricMemory
        c10d._register_process_group(self._name, registered)
        memory.set_group_info(self._name, self.rank, self.size, store)
        self._buffer = memory.empty_strided_p2p((TWO_SHOT_BYTES,), (1,), torch.uint8, device, self._name)
        self._kept = registered, memory.rendezvous(self._buffer, self._name)  # torch keeps neither alive
        self.all_gather, self.reduce_scatter, self.all_to_all = (
            group.all_gather,
            group.reduce_scatter,
            group.all_to_all,
        )
        self.send, self.receive, self.broadcast = group.send, group.receive, group.broadcast
        self.barrier, self.check, self.close = group.barrier, group.check, group.close
        self._sum = group.all_reduce

    def all_reduce(self, x: Tensor) -> Tensor:
        """By one kernel, which can be part of a graph; x stays as it is."""
        buffer = self._buffer[: x.nbytes]
        if x.dtype not in DTYPES or x.nbytes % ALIGNED or x.data_ptr() % ALIGNED:
            return self._sum(x)
        if x.nbytes <= ONE_SHOT_BYTES:
            found = torch.ops.symm_mem.one_shot_all_reduce_copy(
                buffer.view(x.dtype), x.view(-1), "sum", self._name
            )
            return found.view_as(x)
        if x.nbytes <= TWO_SHOT_BYTES and x.nbytes % (ALIGNED * self.size) == 0:
            mine, out = buffer.view(x.dtype), torch.empty_like(x)
            mine.copy_(x.view(-1))
            torch.ops.symm_mem.two_shot_all_reduce_out(mine, "sum", self._name, out.view(-1))
            return out
        return self._sum(x)
