"""What a machine offers: facts, measured once. Knows no model and no engine."""

from collections.abc import Set
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Platform:
    """One device of this process."""

    name: str  # cpu | cuda
    device: torch.device
    default_dtype: torch.dtype  # where a checkpoint's own dtype has no fast kernels here
    total_bytes: int
    available_bytes: int  # when the platform was detected
    attention_order: tuple[str, ...]  # backends, the best first
    num_threads: int
    num_nodes: int = 1  # of memory (NUMA), that all threads are on
    processors: Set[int] = frozenset()  # those of a memory node, if this rank's threads stay on one
