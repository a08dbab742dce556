"""Facts about a GPU that launches depend on: of one that is there, or of one that is only described.

Tensors on torch's `meta` device stand for memory of the described one. So the code that launches kernels can be run
without a GPU, to learn which kernels it would launch (engine/precompile.py).
"""

import functools
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """What kernels are chosen and compiled by."""

    processors: int
    shared_bytes: int  # that one program may have
    capability: tuple[int, int]


_described: list[Gpu] = []


def describe(gpu: Gpu) -> None:
    """From now on, `meta` tensors of this process are that GPU's."""
    _described[:] = [gpu]


def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU's facts; None for any other device."""
    if device.type == "meta":
        return _described[0] if _described else None
    return _measured(device) if device.type == "cuda" else None


@functools.cache
def _measured(device: torch.device) -> Gpu:
    from triton.runtime import driver  # only where there are GPUs

    found = torch.cuda.get_device_properties(device)
    shared_bytes = driver.active.utils.get_device_properties(
        torch.cuda.current_device() if device.index is None else device.index
    )["max_shared_mem"]
    return Gpu(found.multi_processor_count, shared_bytes, (found.major, found.minor))
