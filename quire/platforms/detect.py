"""Which platform this process runs on."""

import torch

from quire.errors import ConfigError
from quire.platforms import cpu, cuda
from quire.platforms.base import Platform


def detect(device: str = "auto") -> Platform:
    """The platform for `device`: auto (a GPU if there is one), cpu, cuda or cuda:N.

    Raises:
        ConfigError: the device is unknown or absent.
    """
    if device == "auto":
        return cuda.detect() if torch.cuda.is_available() else cpu.detect()
    if device == "cpu":
        return cpu.detect()
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index.isdigit() or device == "cuda"):
        raise ConfigError(f"device is {device!r}; it must be auto, cpu, cuda or cuda:N")
    return cuda.detect(int(index) if index else None)
