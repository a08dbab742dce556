"""What launches ask about the GPU, and how one kernel follows another."""

from typing import Any

import torch
import triton.language as tl

from quire.kernels.gpu import gpu_of
from quire.kernels.triton.linear import NEVER
from quire.kernels.triton.tiles import SHARED_BYTES

INTERPRETED_PROCESSORS = 6
ALIGNED = 16  # numbers; else loads are short ones, which go through the first-level cache
PDL_CAPABILITY = (9, 0)


def machine(device: torch.device) -> tuple[int, int, bool]:
    """(processors, bytes of shared memory of a program, whether kernels can start before the last one ends)."""
    gpu = gpu_of(device)
    if gpu is None:
        return INTERPRETED_PROCESSORS, SHARED_BYTES, False
    return gpu.processors, gpu.shared_bytes, gpu.capability >= PDL_CAPABILITY


def following(device: torch.device, when: tl.constexpr, *strides: int) -> dict[str, Any]:
    """Constants that let the next kernel start at `when` (linear.py), where it can at all.

    It can where what lies so many numbers apart is read past the first-level cache.
    """
    if machine(device)[2] and when != NEVER and all(stride % ALIGNED == 0 for stride in strides):
        return {"NEXT": when.value, "launch_pdl": True}
    return {"NEXT": NEVER.value}
