"""What the operations `recurrence` and `causal_conv` are tested with."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Sizes:
    """Of a step. Decays are `num_decays` to a head: one, or as many as a key has dimensions."""

    lengths: tuple[int, ...]
    heads: int
    key_heads: int
    dk: int
    dv: int
    per_channel: bool = False
    delta: bool = True
    num_padding: int = 0


@dataclass(frozen=True)
class Step:
    """Arguments of the operation."""

    v: Tensor
    q: Tensor
    k: Tensor
    decay: Tensor
    beta: Tensor | None
    state: Tensor
    rows: Tensor
    query_starts: Tensor

    def arguments(self) -> tuple[Tensor | None, ...]:
        """All but `invariant`."""
        return self.v, self.q, self.k, self.decay, self.beta, self.state, self.rows, self.query_starts


CASES = (
    Sizes((1,), 2, 1, 16, 16),
    Sizes((5, 0, 1, 9), 6, 3, 12, 20),
    Sizes((3, 1), 4, 2, 128, 128),
    Sizes((7, 2), 3, 3, 20, 33, per_channel=True),
    Sizes((0, 6), 4, 2, 64, 80, delta=False),
    Sizes((2, 3), 2, 2, 48, 7, per_channel=True, delta=False),
    # Sequences long enough for chunks, which end anywhere, among short ones.
    Sizes((16, 0, 3, 70, 15), 4, 2, 20, 33),
    Sizes((1, 129), 2, 1, 128, 24, delta=False),
    Sizes((37,), 2, 2, 136, 16),
)


def make(sizes: Sizes, dtype: torch.dtype, key_dtype: torch.dtype, seed: int = 0) -> Step:
    """Keys are of length 1 and states forget, as in networks. Values lie further apart, as parts of a product do."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    num_rows, total = len(sizes.lengths) + 2, sum(sizes.lengths) + sizes.num_padding
    v = noise(total, sizes.heads * sizes.dv + 3).to(dtype)[:, 3:].unflatten(1, (sizes.heads, sizes.dv))
    q, k = (F.normalize(noise(total, sizes.key_heads, sizes.dk), dim=-1).to(key_dtype) for _ in range(2))
    ends = torch.tensor(sizes.lengths).cumsum(0)
    room = noise(num_rows, sizes.heads * sizes.dk * sizes.dv + 16)[
        :, 16:
    ]  # between it lie other layers' states
    return Step(
        v=v,
        q=q,
        k=k,
        decay=noise(total, sizes.heads, sizes.dk if sizes.per_channel else 1).sigmoid(),
        beta=noise(total, sizes.heads).sigmoid() if sizes.delta else None,
        state=room.unflatten(1, (sizes.heads, sizes.dk, sizes.dv)),
        rows=torch.randperm(num_rows, generator=generator)[: len(sizes.lengths)],
        query_starts=F.pad(ends, (1, 0)).int(),
    )


def steps(dtype: torch.dtype) -> Iterator[Step]:
    for sizes in CASES:
        for key_dtype in (dtype, torch.float32):
            yield make(sizes, dtype, key_dtype)


CONVOLUTIONS = (  # lengths of sequences, channels, width
    ((1,), 16, 4),
    ((5, 0, 1, 9, 2), 130, 4),
    ((1, 1, 1), 33, 3),
    ((40, 3), 20, 2),
)


def make_convolution(
    lengths: tuple[int, ...],
    channels: int,
    width: int,
    dtype: torch.dtype,
    *,
    bias: bool,
    num_padding: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Arguments but the last one. Rows of x lie further apart than they are long."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    num_rows, total = len(lengths) + 2, sum(lengths) + num_padding
    return (
        noise(total, channels + 5)[:, 5:],
        noise(channels, width),
        noise(channels) if bias else None,
        noise(num_rows, channels * (width - 1) + 9)[:, 9:].unflatten(1, (channels, width - 1)),
        torch.randperm(num_rows, generator=generator)[: len(lengths)],
        F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int(),
    )
