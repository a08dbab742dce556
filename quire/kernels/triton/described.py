"""Launches for a GPU that is only described (kernels/gpu.py): kernels are compiled for it, and nothing runs."""

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from quire.kernels.gpu import Gpu, describe

WARP_SIZE = 32


class NoLaunches:
    """A driver for Triton with a GPU's facts and without the GPU: loads and launches nothing."""

    def __init__(self, gpu: Gpu):
        self.target = GPUTarget("cuda", gpu.capability[0] * 10 + gpu.capability[1], WARP_SIZE)
        self.gpu, self.utils = gpu, self

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.gpu.shared_bytes, "multiprocessor_count": self.gpu.processors}

    def load_binary(self, *binary: object) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, most threads."""
        return 0, 0, 0, 0, 1024

    def launcher_cls(self, source: object, metadata: object) -> Any:
        return lambda *args: None


def compile_only(gpu: Gpu) -> None:
    """From now on `meta` tensors are that GPU's, and kernels are compiled only. For processes that do nothing else."""
    describe(gpu)
    driver.set_active(NoLaunches(gpu))
