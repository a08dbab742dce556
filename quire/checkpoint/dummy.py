"""Random weights with a checkpoint's interface, for benchmarks and tests without files."""

import hashlib
import math
from typing import Any

import torch

PERIOD = 4_194_301  # a prime, so that rows of no matrix repeat in step
STD = 0.02


class DummyCheckpoint:
    """Every tensor exists: normally distributed, or near 1 for the weights of norms and other factors.

    A value depends on the seed, the tensor's name and its place only, not on loading order, sharding or device.
    """

    def __init__(
        self,
        seed: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ):
        """`device`: where tensors are made, of noise that comes from the CPU once."""
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        self._noise = (torch.randn(PERIOD, generator=generator) * STD).to(dtype).to(device)

    def __contains__(self, name: object) -> bool:
        return True

    def tensor(self, name: str, *, shape: tuple[int, ...], rows: slice | None = None) -> torch.Tensor:
        """A new tensor: the noise, repeated from a place that follows from the name."""
        start, stop, _ = (rows or slice(None)).indices(shape[0]) if shape else (0, 1, 1)
        row = math.prod(shape[1:])
        values = self._values(self._offset(name) + start * row, (stop - start) * row)
        values = values.view((stop - start, *shape[1:]) if shape else ())
        return values.add_(1) if _is_factor(name) else values

    def _offset(self, name: str) -> int:
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % PERIOD

    def _values(self, start: int, count: int) -> torch.Tensor:
        out = torch.empty(count, dtype=self._noise.dtype, device=self._noise.device)
        done = 0
        while done < count:
            at = (start + done) % PERIOD
            taken = min(PERIOD - at, count - done)
            out[done : done + taken] = self._noise[at : at + taken]
            done += taken
        return out

    def unused(self) -> list[str]:
        return []

    def finish(self) -> None:
        """Nothing can be left over."""


class MetaWeights:
    """Every tensor exists, and has a shape and a dtype but no numbers."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __contains__(self, name: object) -> bool:
        return True

    def tensor(self, name: str, *, shape: tuple[int, ...], rows: slice | None = None) -> torch.Tensor:
        whole = torch.empty(shape, dtype=self.dtype, device="meta")
        return whole if rows is None else whole[rows]


class Made:
    """A tensor that is made up when it is indexed."""

    def __init__(self, dummy: DummyCheckpoint, name: str, shape: tuple[int, ...]):
        self.dummy, self.name, self.shape = dummy, name, shape

    def __getitem__(self, item: Any) -> torch.Tensor:
        return self.dummy.tensor(self.name, shape=self.shape)[item]


def _is_factor(name: str) -> bool:
    *_, module, kind = ("", *name.split("."))
    return kind == "weight" and "norm" in module or kind in ("layer_scalar", "per_expert_scale")
