"""An operation is its plain-torch reference; faster kernels register beside it for a device and dtypes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Kernel = Callable[..., Any]


class Op:
    """Calls the kernel registered for its first argument's device and dtype, else the reference."""

    __slots__ = ("kernels", "name", "reference")

    def __init__(self, reference: Kernel):
        self.name: str = reference.__name__
        self.reference = reference
        self.kernels: dict[tuple[str, torch.dtype], Kernel] = {}

    def on(self, device: str, *dtypes: torch.dtype) -> Callable[[Kernel], Kernel]:
        """Register a kernel that computes what the reference computes. It takes the same arguments."""

        def register(kernel: Kernel) -> Kernel:
            devices = (device, "meta") if device == "cuda" else (device,)  # a GPU that is described; gpu.py
            self.kernels.update({(name, dtype): kernel for name in devices for dtype in dtypes})
            return kernel

        return register

    def __call__(self, x: Tensor, *args: Any) -> Any:
        return self.kernels.get((x.device.type, x.dtype), self.reference)(x, *args)


def op(reference: Kernel) -> Op:
    """Make an operation of its reference."""
    return Op(reference)
