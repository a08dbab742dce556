"""Memory for the KV cache. Knows bytes, not what they hold."""

import mmap

import torch
from torch import Tensor


def allocate_cache(num_blocks: int, block_bytes: int, device: torch.device) -> Tensor:
    """A pool of zeros [num_blocks, block_bytes] uint8.

    On a CPU pages are taken when they are first written, so that a large pool costs neither start-up time nor memory
    that nobody uses. Zeros matter: what a block held before is multiplied by a weight of 0, and 0 times NaN is NaN.
    """
    if device.type != "cpu" or not block_bytes:
        return torch.zeros(num_blocks, block_bytes, dtype=torch.uint8, device=device)
    pages = mmap.mmap(-1, num_blocks * block_bytes)
    return torch.frombuffer(pages, dtype=torch.uint8).view(num_blocks, block_bytes)
