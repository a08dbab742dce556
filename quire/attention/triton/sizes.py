"""How large the tiles of kernels are, by the sizes of heads and the GPU."""

from dataclasses import dataclass

import torch

from quire.attention.shapes import DIM_STEP, CacheShape
from quire.kernels.gpu import gpu_of


@dataclass(frozen=True, slots=True)
class Tiles:
    """Sizes measured on an H100. Tokens in a tile, rows of queries, warps, and tiles on their way (stages)."""

    decode_tile: int
    decode_warps: int
    decode_stages: int
    most_rows: int  # of the decode kernel
    rows: int
    tile: int
    warps: int
    stages: int


def tiles_for(shape: CacheShape, dtype: torch.dtype, device: torch.device) -> Tiles:
    """Tiles that fit in shared memory and registers."""
    wide = max(shape.k_dim, shape.v_dim)
    if dtype is torch.float32:  # for comparisons: no tensor cores, so that products are exact
        tile, rows = 32 if wide <= 256 else 16, 32 if wide <= 128 else 16
        return Tiles(tile, 4, 1, most_rows=16, rows=rows, tile=tile, warps=4, stages=1)
    if wide <= 128:
        whole = not halves(shape.k_dim)[1] and not halves(shape.v_dim)[1]
        return Tiles(64, 2 if whole else 4, 2, most_rows=64, rows=64, tile=64, warps=4, stages=3)
    if _is_small(device):
        if wide <= 256:
            return Tiles(32, 4, 2, most_rows=32, rows=64, tile=32, warps=4, stages=2)
        return Tiles(32, 4, 2, most_rows=32, rows=32, tile=16, warps=4, stages=1)
    if wide <= 256:
        return Tiles(32, 4, 2, most_rows=32, rows=64, tile=64, warps=4, stages=2)
    return Tiles(32, 4, 2, most_rows=32, rows=64, tile=32, warps=8, stages=2)


def halves(dim: int) -> tuple[int, int]:
    """A head dimension as two powers of two, or one and 0, that together hold it."""
    first = max(DIM_STEP, 1 << (dim.bit_length() - 1))
    return first, 0 if dim <= first else max(DIM_STEP, power_of_two(dim - first))


def power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def _is_small(device: torch.device) -> bool:
    """Whether programs have 99 KiB of shared memory, as on desktops, and not the 163 or more of data centres."""
    gpu = gpu_of(device)
    return gpu is not None and gpu.capability != (8, 0) and gpu.capability[0] not in (9, 10)
