"""Counter-based random numbers: the same (seed, position, token) gives the same bits anywhere, in any batch.

Philox4x32-10 from Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC'11). Knows no sampling.

    key     = (seed low, seed high)                                 32 bits each
    counter = (token id // 4, position low, position high, 0)       word number token id % 4 is the token's
"""

from typing import NamedTuple

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF
_LOW64 = 0xFFFFFFFFFFFFFFFF


class Words(NamedTuple):
    """Four 32-bit words, each an int64 tensor (torch has no arithmetic on uint32)."""

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Philox4x32-10 over tensors that broadcast with one another; every value is in [0, 2**32)."""
    a, b, c, d = counter
    low, high = key
    for _ in range(_ROUNDS):
        # The products wrap around in int64, yet all their 64 bits are right; the masks undo the sign.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (second >> 32 & _LOW) ^ b ^ low,
            second & _LOW,
            (first >> 32 & _LOW) ^ d ^ high,
            first & _LOW,
        )
        low, high = low + _WEYL[0] & _LOW, high + _WEYL[1] & _LOW
    return Words(a, b, c, d)


def uniform(bits: Tensor) -> Tensor:
    """32 random bits (int64) to a float32 in [2**-33, 1 - 2**-24]: finest near 0, and never 0 or 1."""
    return (bits.to(torch.float32) * 2.0**-32 + 2.0**-33).clamp_(max=1 - 2.0**-24)


def gumbel(u: Tensor) -> Tensor:
    """Standard Gumbel noise from uniforms.

    -log(-log(1 - u)), not -log(-log(u)): float32 is finest near 0, which then serves the upper tail. A token
    of probability 1e-9 keeps its chance, where 24 bits near 1 would cut the noise at 16.6.
    """
    return -torch.log(-torch.log1p(-u))


def noise(seeds: Tensor, positions: Tensor, tokens: range) -> Tensor:
    """Gumbel noise [R, T] in float32 of `tokens`, for `seeds` [R] and `positions` [R], both int64."""
    seeds, positions = seeds[:, None], positions[:, None]
    first = tokens.start // 4
    groups = torch.arange(first, (tokens.stop + 3) // 4, device=seeds.device)[None]
    counter = Words(groups, positions & _LOW, positions >> 32 & _LOW, torch.zeros_like(groups))
    words = philox(counter, (seeds & _LOW, seeds >> 32 & _LOW))
    bits = torch.stack(words, dim=-1).flatten(1)[:, tokens.start - 4 * first :][:, : len(tokens)]
    return gumbel(uniform(bits))


def fold(seed: int, *indices: int) -> int:
    """A signed 64-bit seed of its own for every (seed, indices), by SplitMix64's finalizer.

    `fold(seed, i)` may seed sequence `i` of a request, `fold(engine_seed, ordinal)` a request without a seed.
    """
    state = _mix(seed & _LOW64)
    for index in indices:
        state = _mix(state + _mix((index & _LOW64) + 0x9E3779B97F4A7C15) & _LOW64)
    return state - (1 << 64) if state >> 63 else state


def _mix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _LOW64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _LOW64
    return x ^ x >> 31
