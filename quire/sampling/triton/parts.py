"""What the sampling kernels share: sizes, a row's parameters, noise, and searches for a threshold.

A row of logits is cut into chunks, one program each; a chunk's groups report their greatest logits, which say where
the few tokens are that can matter. Chunks do not depend on the batch, and what they found is put together in their
order, so a row's result is the same in any batch.

A filter is a threshold t: the least for which what lies above it, in tokens or in probability, is less than a goal.
Searches run over the bits of floats, ordered as their values, so they end after at most 32 halvings.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from quire.sampling.draw import Controls

GREEDY, RANDOM, FILTERED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# What is left to do for a row: nothing; search top_p's threshold; only draw, from min_p on; search top_k's first.
DONE, SEARCH, DRAW, RANK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
INF = tl.constexpr(float("inf"))
ONE = tl.constexpr(2.0**40)  # 1 as a fixed-point weight: sums of a million are exact in 64 bits, in any order


class Sizes(NamedTuple):
    """Powers of 2. Tests make them small, so that small vocabularies take every path."""

    chunk: int = 4096  # tokens of a program
    group: int = 64  # tokens that share a maximum; at least 4
    live: int = 1024  # groups of a row that are looked at again; at least `tile` / `group`
    tile: int = 4096  # tokens that are looked at together
    kept: int = 4096  # tokens of a row among which the exact threshold is searched at once
    width: int = 1  # at least a row's chunks; follows from the vocabulary


class Knobs(NamedTuple):
    """`Controls` as the kernels take them: each contiguous, of shape [R]."""

    scale: Tensor
    log_min_p: Tensor
    top_k: Tensor
    top_p: Tensor
    seeds: Tensor
    positions: Tensor


class Found(NamedTuple):
    """What a scan saw of each chunk, [R, C], and of its groups. Which of them are written depends on the row."""

    top: Tensor  # float32: the greatest logit; +inf where there is a NaN
    best: Tensor  # float32: the greatest score, of `token`
    token: Tensor  # int32
    mass: Tensor  # float32: sum of exp(scaled - greatest scaled)
    maxima: Tensor  # float32 [R, C * chunk / group]: the greatest logit of each group


class Out(NamedTuple):
    """What the draw returns, and what `settle` leaves to do."""

    tokens: Tensor  # int64 [R]
    bad: Tensor  # uint8 [R]
    status: Tensor  # int32 [R]: DONE, or what is left to do


def knobs_of(controls: Controls) -> Knobs:
    filters = controls.filters
    columns = (
        controls.scale,
        filters.log_min_p,
        filters.top_k,
        filters.top_p,
        controls.seeds,
        controls.positions,
    )
    return Knobs(*(column.contiguous() for column in columns))


@triton.jit
def scalar(value: tl.constexpr):
    """An int32 that branches may assign anew."""
    return tl.full([], value, tl.int32)


@triton.jit
def kind_of(knobs, row, vocab_size):
    """GREEDY, RANDOM or FILTERED."""
    off = tl.load(knobs.top_k + row) >= vocab_size
    off &= (tl.load(knobs.top_p + row) >= 1) & (tl.load(knobs.log_min_p + row) == -INF)
    kind = tl.where(off, RANDOM, FILTERED)
    return tl.where(tl.load(knobs.scale + row) > 0, kind, GREEDY)


@triton.jit
def status_of(knobs, row, vocab_size):
    """What is left to do for a filtered row whose tokens are too many for `settle`."""
    status = tl.where(tl.load(knobs.top_p + row) < 1, SEARCH, DRAW)
    return tl.where(tl.load(knobs.top_k + row) < vocab_size, RANK, status)


@triton.jit
def key_of(x):
    """Bits of floats (never NaN) as an int32 that orders as they do; -0 as 0."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def float_of(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def lowest(keys, weights, goal, low, high):
    """The least key t in (low, high] for which the weights of keys above t add up to less than `goal` (float64).

    `low` and `high` are int64; for `high` the sum must be less. Weights are integers, so their order is no matter.
    """
    while high - low > 1:
        middle = low + (high - low) // 2
        above = tl.sum(tl.where(keys > middle, weights, 0), 0)
        enough = above.to(tl.float64) < goal
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle)
    return high


@triton.jit
def fixed(weights):
    """Weights in [0, 1] as int64."""
    return (weights * ONE).to(tl.int64)


@triton.jit
def log_near_one(f):
    """log(1 + f) for |f| <= 0.42, by the series of 2 atanh(f / (2 + f)); what is left out is below 2e-9 of it."""
    s = f / (2.0 + f)
    q = s * s
    return 2.0 * s * (1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9)))))


@triton.jit
def gumbel(bits):
    """Gumbel noise from 32 random bits (uint32), as `philox.gumbel(philox.uniform(bits))` within 1e-6 of its size."""
    root_half: tl.constexpr = 0x3F3504F3  # the bits of sqrt(1/2)
    u = tl.minimum(bits.to(tl.float32) * 2.0**-32 + 2.0**-33, 1 - 2.0**-24)
    # log(1 - u): as precise for small u as u itself.
    x = (1.0 - u).to(tl.int32, bitcast=True)
    exponent = (x - root_half) >> 23
    mantissa = (x - (exponent << 23)).to(tl.float32, bitcast=True)
    f = tl.where(exponent == 0, -u, mantissa - 1.0)
    y = (-(exponent.to(tl.float32) * 0.693147181 + log_near_one(f))).to(tl.int32, bitcast=True)
    exponent = (y - root_half) >> 23
    mantissa = (y - (exponent << 23)).to(tl.float32, bitcast=True)
    return -(exponent.to(tl.float32) * 0.693147181 + log_near_one(mantissa - 1.0))


@triton.jit
def random_words(groups, knobs, row):
    """The four Philox words of each counter in `groups` [N] (int32)."""
    position = tl.load(knobs.positions + row)
    zero = tl.zeros_like(groups).to(tl.uint32)
    low, high = zero + position.to(tl.uint32), zero + (position >> 32).to(tl.uint32)
    return tl.philox(tl.load(knobs.seeds + row), groups.to(tl.uint32), low, high, zero)


@triton.jit
def noise(first, count: tl.constexpr, knobs, row):
    """Gumbel noise [count / 4, 4] of the tokens from `first` on; both are multiples of 4."""
    a, b, c, d = random_words(first // 4 + tl.arange(0, count // 4), knobs, row)
    return gumbel(tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [count // 4, 4]))


@triton.jit
def noise_of(tokens, knobs, row):
    """Gumbel noise [N] of single tokens [N]."""
    a, b, c, d = random_words(tokens // 4, knobs, row)
    word = tokens % 4
    return gumbel(tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d)))


@triton.jit
def greatest(scores):
    """The greatest of scores [N] or [N, M], and where it is first, counted row by row.

    Rows are not joined first: Triton lets a reduction read a reshaped tensor in any order, and its indices are then
    those of other places.
    """
    if len(scores.shape) == 1:
        top, index = tl.max(scores, 0, return_indices=True, return_indices_tie_break_left=True)
    else:
        each, columns = tl.max(scores, 1, return_indices=True, return_indices_tie_break_left=True)
        top, row = tl.max(each, 0, return_indices=True, return_indices_tie_break_left=True)
        column = tl.sum(tl.where(tl.arange(0, scores.shape[0]) == row, columns, 0), 0)
        index = row * scores.shape[1] + column
    return top, index


@triton.jit
def tile_of(first, count: tl.constexpr):
    """Token ids [count / 4, 4] from `first` on, as `noise` has them."""
    return first + tl.arange(0, count // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def pick(found, row, num_chunks, width: tl.constexpr):
    """The token with the row's greatest score."""
    chunks = tl.arange(0, width)
    best = tl.load(found.best + row * num_chunks + chunks, mask=chunks < num_chunks, other=-INF)
    _, chunk = greatest(best)
    return tl.load(found.token + row * num_chunks + chunk)
