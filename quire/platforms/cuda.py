"""NVIDIA GPUs, through torch."""

import torch

from quire.errors import ConfigError
from quire.platforms.base import Platform


def detect(index: int | None = None) -> Platform:
    """The GPU `index`, or the current one.

    Raises:
        ConfigError: there is no such GPU.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise ConfigError("device is 'cuda', but torch finds no CUDA GPU; use --device cpu")
    index = torch.cuda.current_device() if index is None else index
    if not 0 <= index < count:
        raise ConfigError(f"device is 'cuda:{index}', but this machine has GPUs 0 to {count - 1}")
    available, total = torch.cuda.mem_get_info(index)
    return Platform(
        name="cuda",
        device=torch.device("cuda", index),
        default_dtype=torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16,
        total_bytes=total,
        available_bytes=available,
        attention_order=("triton", "reference"),
        num_threads=torch.get_num_threads(),
    )
