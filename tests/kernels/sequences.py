"""Random inputs of kernels; of those that have a state of each sequence, with ragged batches of them."""

from collections.abc import Iterator

import torch
from torch import Tensor

COUNTS = ((1,), (7,), (0, 1, 5, 0, 1), (1, 1, 1), (19, 0), ())  # of rows of sequences
PADDING, NUM_ROWS = 3, 8


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 2.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def layout(counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rows of the state, not in their order, and where sequences start."""
    rows = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(1))[: len(counts)]
    return rows, torch.tensor([0, *counts]).cumsum(0).int()


def rows_among_others(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """States whose rows have something else beside them."""
    size = torch.Size(shape).numel()
    return noise(NUM_ROWS, size + 64, dtype=dtype, seed=5, scale=1.0)[:, :size].unflatten(1, shape)


def convolutions(dtype: torch.dtype) -> Iterator[tuple[object, ...]]:
    for counts in COUNTS:
        for channels, width in ((70, 3), (130, 4), (5, 2), (16, 5)):
            x = noise(sum(counts) + PADDING, 3 * channels, dtype=dtype)[:, channels : 2 * channels]
            weight, bias = (noise(channels, *w, dtype=dtype, seed=2, scale=0.5) for w in ((width,), ()))
            state = rows_among_others(channels, width - 1, dtype=dtype)
            yield x, weight, bias, state, *layout(counts), True
            yield x, weight, None, state, *layout(counts), False


def scans(dtype: torch.dtype) -> Iterator[tuple[object, ...]]:
    for counts in COUNTS:
        for channels, size in ((70, 16), (130, 5), (3, 1)):
            num_rows = sum(counts) + PADDING
            x, dt = (
                noise(num_rows, 2 * channels, scale=0.7)[:, :channels],
                noise(num_rows, channels, seed=2).abs(),
            )
            rate, skip = -noise(size, channels, seed=3).exp(), noise(channels, seed=4)
            b, c = noise(num_rows, 7 + 2 * size, seed=6, scale=0.7)[:, 7:].split(size, 1)
            yield x, dt, rate, b, c, skip, rows_among_others(size, channels), *layout(counts)
