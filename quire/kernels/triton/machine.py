"""What launches ask about the GPU, and how one kernel follows another."""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

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


def following(x: Tensor, when: tl.constexpr) -> dict[str, Any]:
    """Constants that let the kernel after one of x [M, K] start `when` it can, where it can at all; see linear.py."""
    can_start_early = machine(x.device)[2] and when != NEVER
    if can_start_early and x.shape[-1] % ALIGNED == 0 and x.stride(0) % ALIGNED == 0:
        return {"NEXT": when.value, "launch_pdl": True}
    return {"NEXT": NEVER.value}
