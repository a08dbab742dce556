"""Which platform this process runs on."""

import torch

from quire.errors import ConfigError
from quire.platforms import cpu, cuda
from quire.platforms.base import Platform


def detect(device: str = "auto", index: int = 0, count: int = 1) -> Platform:
    """The platform for `device`: auto (a GPU if there is one), cpu, cuda or cuda:N.

    Args:
        index: of this rank among the `count` ranks that share a CPU.

    Raises:
        ConfigError: the device is unknown or absent.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return cpu.detect(index, count)
    kind, _, number = device.partition(":")
    if kind != "cuda" or not (number.isdigit() or device == "cuda"):
        raise ConfigError(f"device is {device!r}; it must be auto, cpu, cuda or cuda:N")
    return cuda.detect(int(number) if number else None)
