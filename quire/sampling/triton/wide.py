"""The draw of rows whose filters keep too many tokens for `draw.settle`: nearly flat ones, mostly.

`weigh` reads all logits a few times, and each time narrows the interval that holds top_p's threshold. `draw_wide` then
draws among all that lie above the interval's lower end. The winner is right if it lies above the upper end too, as
nearly always; else, and for a top_k too large for `settle`, `conclude` searches the exact threshold, one program a row.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from quire.sampling.triton.parts import (
    DONE,
    DRAW,
    INF,
    RANK,
    SEARCH,
    Found,
    Knobs,
    Out,
    Sizes,
    float_of,
    greatest,
    key_of,
    noise,
    pick,
    scalar,
    tile_of,
)

ROUNDS = 3  # after a first interval of a third of its distance from the top, each divides it by PIVOTS
PIVOTS = tl.constexpr(16)  # the last one is below min_p's threshold; it yields the mass that top_p divides
SLICE = tl.constexpr(512)  # tokens that are compared with all pivots together
FARTHEST = tl.constexpr(32.0)  # the first round's lowest pivot, as a distance from the greatest scaled logit
RATIO_LOG2 = tl.constexpr(0.5)  # ... and each pivot's distance to the next one's, in powers of 2


class Search(NamedTuple):
    """The state of wide rows. An interval (low, high] holds top_p's threshold."""

    bounds: Tensor  # float32 [ROUNDS + 1, R, 2]: the interval before each round, and at the end
    sums: Tensor  # float32 [ROUNDS, R, C, PIVOTS]: each chunk's weight above each pivot


def draw(
    logits: Tensor, row_stride: int, vocab_size: int, knobs: Knobs, found: Found, out: Out, sizes: Sizes
) -> None:
    """Finish the rows whose `out.status` is not DONE."""
    num_rows, num_chunks = found.top.shape
    search = Search(
        logits.new_empty(ROUNDS + 1, num_rows, 2),
        logits.new_empty(ROUNDS, num_rows, num_chunks, PIVOTS.value),
    )
    given = (logits, row_stride, vocab_size, knobs, found, out, search)
    grid = (num_chunks, num_rows)
    for turn in range(ROUNDS):
        weigh[grid](*given, turn, sizes, num_warps=8)
    draw_wide[grid](*given, ROUNDS, sizes, num_warps=8)
    conclude[(num_rows,)](*given, ROUNDS, sizes, num_warps=16)


@triton.jit
def most_of(found, row, num_chunks, scale, width: tl.constexpr):
    """The row's greatest scaled logit."""
    chunks = tl.arange(0, width)
    tops = tl.load(found.top + row * num_chunks + chunks, mask=chunks < num_chunks, other=-INF)
    return tl.max(tops, 0) * scale


@triton.jit
def pivots_of(low, high, most, floor, turn: tl.constexpr):
    """Where a round looks: [PIVOTS], ascending but for the last."""
    step = tl.arange(0, PIVOTS)
    if turn == 0:
        pivots = most - FARTHEST * tl.exp2(-RATIO_LOG2 * step.to(tl.float32))
    else:
        start = tl.maximum(low, high - FARTHEST)
        pivots = start + (high - start) * ((step + 1).to(tl.float32) / PIVOTS)
    below_floor = tl.where(floor == -INF, floor, float_of(key_of(floor) - 1))
    return tl.where(step == PIVOTS - 1, below_floor, pivots)


@triton.jit
def narrow(low, high, pivots, above, top_p):
    """The interval after a round that found the weights `above` (float64) each of `pivots`."""
    usable = tl.arange(0, PIVOTS) < PIVOTS - 1
    total = tl.sum(tl.where(usable, 0.0, above), 0)
    enough = above < top_p.to(tl.float64) * total
    high = tl.minimum(high, tl.min(tl.where(usable & enough, pivots, INF), 0))
    low = tl.maximum(low, tl.max(tl.where(usable & (pivots < high) & (enough == 0), pivots, -INF), 0))
    return low, high


@triton.jit
def interval(row, knobs, found, search, turn: tl.constexpr, width: tl.constexpr):
    """(low, high, greatest, min_p's threshold) at the start of round `turn`, from the round before.

    Every program of the row computes it again: that costs less than a kernel between two rounds.
    """
    num_chunks, num_rows = tl.num_programs(0), tl.num_programs(1).to(tl.int64)
    most = most_of(found, row, num_chunks, tl.load(knobs.scale + row), width)
    floor = most + tl.load(knobs.log_min_p + row)
    low, high = tl.full([], -INF, tl.float32), most
    if turn > 0:
        place = search.bounds + ((turn - 1) * num_rows + row) * 2
        low, high = tl.load(place), tl.load(place + 1)
        chunks = tl.arange(0, width)
        places = (((turn - 1) * num_rows + row) * num_chunks + chunks)[:, None] * PIVOTS
        places += tl.arange(0, PIVOTS)[None, :]
        sums = tl.load(search.sums + places, mask=(chunks < num_chunks)[:, None], other=0.0)
        pivots = pivots_of(low, high, most, floor, turn - 1)
        low, high = narrow(low, high, pivots, tl.sum(sums.to(tl.float64), 0), tl.load(knobs.top_p + row))
    if tl.program_id(0) == 0:
        place = search.bounds + (turn * num_rows + row) * 2
        tl.store(place, low)
        tl.store(place + 1, high)
    return low, high, most, floor


@triton.jit
def weigh(
    logits,
    row_stride,
    vocab_size,
    knobs,
    found,
    out,
    search,
    turn: tl.constexpr,
    sizes: tl.constexpr,
):
    """Probability (times a constant) above each pivot in one chunk. Grid (C, R)."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if tl.load(out.status + row) != SEARCH:
        return
    low, high, most, floor = interval(row, knobs, found, search, turn, sizes.width)
    pivots = pivots_of(low, high, most, floor, turn)
    scale = tl.load(knobs.scale + row)
    part: tl.constexpr = min(SLICE.value, sizes.chunk)
    sums = tl.zeros([part, PIVOTS], tl.float32)
    for start in range(0, sizes.chunk, part):
        tokens = chunk * sizes.chunk + start + tl.arange(0, part)
        x = tl.load(logits + row * row_stride + tokens, mask=tokens < vocab_size, other=-INF) * scale
        sums += tl.where(x[:, None] > pivots[None, :], tl.exp(x - most)[:, None], 0.0)
    at = (turn * tl.num_programs(1).to(tl.int64) + row) * tl.num_programs(0) + chunk
    tl.store(search.sums + at * PIVOTS + tl.arange(0, PIVOTS), tl.sum(sums, 0))


@triton.jit
def draw_wide(
    logits,
    row_stride,
    vocab_size,
    knobs,
    found,
    out,
    search,
    turn: tl.constexpr,
    sizes: tl.constexpr,
):
    """The best of a chunk's tokens that may be above the threshold. Grid (C, R)."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    status = tl.load(out.status + row)
    if (status == DONE) | (status == RANK):
        return
    at = row * tl.num_programs(0) + chunk
    low, high, most, floor = interval(row, knobs, found, search, turn, sizes.width)
    scale = tl.load(knobs.scale + row)
    if status == DRAW:
        low = float_of(key_of(floor) - 1)
    best = tl.full([], -INF, tl.float32)
    token = scalar(0)
    if tl.load(found.top + at) * scale > low:
        best, token = best_above(
            logits + row * row_stride, vocab_size, chunk * sizes.chunk, scale, low, (knobs, row), sizes.chunk
        )
    tl.store(found.best + at, best)
    tl.store(found.token + at, token)


@triton.jit
def best_above(logits, vocab_size, first, scale, low, of, count: tl.constexpr):
    """The greatest score among `count` tokens from `first` on whose scaled logit is above `low`, and its token.

    `of` is (knobs, row).
    """
    tokens = tile_of(first, count)
    x = tl.load(logits + tokens, mask=tokens < vocab_size, other=-INF) * scale
    scores = tl.where(x > low, x + noise(first, count, of[0], of[1]), -INF)
    best, index = greatest(scores)
    return best, first + index


@triton.jit
def conclude(
    logits,
    row_stride,
    vocab_size,
    knobs,
    found,
    out,
    search,
    turn: tl.constexpr,
    sizes: tl.constexpr,
):
    """The token of a wide row. Grid (R)."""
    row = tl.program_id(0).to(tl.int64)
    status = tl.load(out.status + row)
    if status == DONE:
        return
    num_chunks = (vocab_size + sizes.chunk - 1) // sizes.chunk
    logits += row * row_stride
    scale = tl.load(knobs.scale + row)
    most = most_of(found, row, num_chunks, scale, sizes.width)
    low, high = tl.full([], -INF, tl.float32), most
    token = scalar(0)
    sure = status == DRAW
    if status != RANK:
        token = pick(found, row, num_chunks, sizes.width)
        place = search.bounds + (turn * tl.num_programs(0).to(tl.int64) + row) * 2
        if status == SEARCH:
            low, high = tl.load(place), tl.load(place + 1)
            sure = tl.load(logits + token) * scale >= high
    if sure == 0:
        token = draw_exactly(logits, vocab_size, knobs, row, most, low, high, sizes)
    tl.store(out.tokens + row, token.to(tl.int64))


@triton.jit
def draw_exactly(logits, vocab_size, knobs, row, most, low, high, sizes: tl.constexpr):
    """The row's token by its exact threshold; of top_p's it is known that it lies in (low, high]."""
    top_k, top_p = tl.load(knobs.top_k + row), tl.load(knobs.top_p + row)
    scale = tl.load(knobs.scale + row)
    least = key_of(most + tl.load(knobs.log_min_p + row))
    if top_k < vocab_size:
        kth = search_row(logits, vocab_size, scale, most, top_k.to(tl.float64), (low, high), False, sizes)
        least = tl.maximum(least, kth)
    if top_p < 1:
        total = tl.max(
            weigh_row(logits, vocab_size, scale, most, least - 1 + 0 * tl.arange(0, PIVOTS), True, sizes), 0
        )
        goal = top_p.to(tl.float64) * total
        least = tl.maximum(least, search_row(logits, vocab_size, scale, most, goal, (low, high), True, sizes))
    best, token = tl.full([], -INF, tl.float32), scalar(0)
    first = scalar(0)
    while first < vocab_size:
        other, index = best_above(
            logits, vocab_size, first, scale, float_of(least - 1), (knobs, row), sizes.chunk
        )
        token = tl.where(other > best, index, token)  # of equals the first stays
        best = tl.maximum(best, other)
        first += sizes.chunk
    return token


@triton.jit
def search_row(logits, vocab_size, scale, most, goal, bounds, by_mass: tl.constexpr, sizes: tl.constexpr):
    """The least key above which the row has less than `goal`, in probability or in tokens."""
    low, high = key_of(bounds[0]).to(tl.int64), key_of(bounds[1]).to(tl.int64)
    step = tl.arange(0, PIVOTS) + 1
    while high - low > 1:
        keys = low + ((high - low) * step + PIVOTS - 1) // PIVOTS  # the last is `high`, none is `low`
        above = weigh_row(logits, vocab_size, scale, most, keys.to(tl.int32), by_mass, sizes)
        enough = (above < goal) | (keys == high)
        high = tl.min(tl.where(enough, keys, high), 0)
        low = tl.max(tl.where((enough == 0) & (keys < high), keys, low), 0)
    return high.to(tl.int32)


@triton.jit
def weigh_row(logits, vocab_size, scale, most, keys, by_mass: tl.constexpr, sizes: tl.constexpr):
    """The row's weight above each of `keys` [PIVOTS], in float64."""
    part: tl.constexpr = min(SLICE.value, sizes.chunk)
    sums = tl.zeros([part, PIVOTS], tl.float64)
    start = scalar(0)
    while start < vocab_size:
        tokens = start + tl.arange(0, part)
        x = tl.load(logits + tokens, mask=tokens < vocab_size, other=-INF) * scale
        weights = tl.exp(x - most) if by_mass else (x > -INF).to(tl.float32)
        above = key_of(x)[:, None] > keys[None, :]
        sums += tl.where(above, weights[:, None], 0.0).to(tl.float64)
        start += part
    return tl.sum(sums, 0)
