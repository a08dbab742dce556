"""What the host sends to a device in a step: many small arrays in one copy that nobody waits for."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The one-dimensional arrays of integers as int64 tensors on the device, slices of one.

    A copy from pageable memory would make the host wait for the steps in flight. Pinned memory is torch's, which
    gives none away again before the device has read it.
    """
    sizes = [len(array) for array in arrays]
    host = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type != "cpu")
    np.concatenate(arrays, out=host.numpy())
    return list(host.to(device, non_blocking=True).split(sizes))


def send(array: np.ndarray, to: Tensor) -> None:
    """Copy an array into a tensor of its shape and type on the device; the array may change afterwards."""
    host = torch.from_numpy(array)
    to.copy_(host if to.device.type == "cpu" else host.pin_memory(), non_blocking=True)
