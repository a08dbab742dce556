"""What a machine offers: facts, measured once. Knows no model and no engine."""

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
    num_nodes: int = 1  # of memory (NUMA), that the threads are on
