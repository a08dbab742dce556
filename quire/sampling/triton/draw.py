"""The draw on a GPU. `scan` reads all logits once; `settle` finishes every row whose answer is among few tokens.

Greedy rows, rows without filters, and rows whose filters keep few tokens (top_k up to about 1000, min_p, and top_p of
any but a nearly flat distribution) are done after these two. The others go on in `wide.py`, whose kernels return at
once for rows that are done: what runs depends on shapes alone, so it can be captured in a graph.

What may differ from the reference: noise is within 1e-6 of its size and masses within 2e-6, so a token whose score or
whose mass from the top lies that close to the deciding one can be taken for the other.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.models.shard import TOKENS
from quire.parallel.vocabulary import Vocabulary
from quire.sampling.draw import Controls
from quire.sampling.triton import wide
from quire.sampling.triton.parts import (
    DONE,
    FILTERED,
    GREEDY,
    INF,
    ONE,
    RANDOM,
    Found,
    Out,
    Sizes,
    fixed,
    float_of,
    greatest,
    key_of,
    kind_of,
    knobs_of,
    lowest,
    noise,
    noise_of,
    pick,
    scalar,
    status_of,
    tile_of,
)


class Scratch(NamedTuple):
    """A filtered row's few: groups worth a look, and tokens (ascending) among which the answer is."""

    groups: Tensor  # int32 [R, live]
    scaled: Tensor  # float32 [R, kept]: scaled logits
    tokens: Tensor  # int32 [R, kept]


def draw(
    logits: Tensor, controls: Controls, vocabulary: Vocabulary, sizes: Sizes | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens and bad rows as `quire.sampling.draw.draw` has them, for float32 `logits` [R, own].

    Filters need everybody's logits: a search for their thresholds by several ranks would have to be as long each time.
    """
    filters = controls.any_filter and not controls.all_greedy
    if vocabulary.axis.size > 1 and (filters or vocabulary.share % TOKENS):
        return draw(vocabulary.gather(logits), controls, Vocabulary(vocabulary.size), sizes)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    num_rows, count = logits.shape
    out = Out(
        logits.new_empty(num_rows, dtype=torch.int64),
        logits.new_empty(num_rows, dtype=torch.uint8),
        logits.new_empty(num_rows, dtype=torch.int32),
    )
    if num_rows == 0:
        return out.tokens, out.bad.view(torch.bool)
    sizes = sizes or Sizes()
    num_chunks = triton.cdiv(vocabulary.share, sizes.chunk)
    sizes = sizes._replace(width=triton.next_power_of_2(num_chunks * vocabulary.axis.size))
    top, best, mass = logits.new_empty(3, num_rows, num_chunks)
    token = logits.new_empty(num_rows, num_chunks, dtype=torch.int32)
    maxima = logits.new_empty(num_rows, num_chunks * (sizes.chunk // sizes.group)) if filters else top
    found, knobs = Found(top, best, token, mass, maxima), knobs_of(controls)
    given = (logits, logits.stride(0), count, knobs, found)
    grid = (num_chunks, num_rows)
    scan[grid](*given, vocabulary.own.start, sizes, not controls.all_greedy, filters, num_warps=8)
    if not filters:
        top, best, token = (vocabulary.axis.all_gather(x, 1) for x in (top, best, token))
        found = found._replace(top=top, best=best, token=token)
        finish[(num_rows,)](found, out, found.top.shape[1], sizes.width, num_warps=1)
        return out.tokens, out.bad.view(torch.bool)
    ids = logits.new_empty(num_rows, sizes.live + sizes.kept, dtype=torch.int32)
    values = logits.new_empty(num_rows, sizes.kept)
    scratch = Scratch(ids, values, ids[:, sizes.live :])
    settle[(num_rows,)](*given, scratch, out, sizes, num_warps=16)
    wide.draw(*given, out, sizes)
    return out.tokens, out.bad.view(torch.bool)


@triton.jit
def scan(
    logits,
    row_stride,
    vocab_size,
    knobs,
    found,
    start,
    sizes: tl.constexpr,
    any_random: tl.constexpr,
    any_filter: tl.constexpr,
):
    """One chunk of a row, whose tokens are those from `start` on. Grid (C, R)."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = row * tl.num_programs(0) + chunk
    first = chunk * sizes.chunk
    tokens = tile_of(first, sizes.chunk)
    x = tl.load(logits + row * row_stride + tokens, mask=tokens < vocab_size, other=-INF)
    x = tl.where(x != x, INF, x)  # either makes the row unusable
    num_groups: tl.constexpr = sizes.chunk // sizes.group
    maxima = tl.max(tl.reshape(x, [num_groups, sizes.group]), 1)
    top = tl.max(maxima, 0)
    tl.store(found.top + at, top)
    kind = scalar(GREEDY)
    if any_random:
        kind = kind_of(knobs, row, vocab_size)
        if any_filter:  # noqa: SIM102 - known when compiled, unlike the next
            if kind == FILTERED:
                scale = tl.load(knobs.scale + row)
                most = tl.where(top > -INF, top * scale, 0.0)
                weights = tl.exp(x * scale - most)
                tl.store(found.mass + at, tl.sum(tl.reshape(weights, [sizes.chunk]), 0))
                tl.store(found.maxima + at * num_groups + tl.arange(0, num_groups), maxima)
        if kind == RANDOM:
            scores = x * tl.load(knobs.scale + row) + noise(start + first, sizes.chunk, knobs, row)
            best, index = greatest(scores)
            tl.store(found.best + at, best)
            tl.store(found.token + at, start + first + index)
    if kind == GREEDY:
        best, index = greatest(x)
        tl.store(found.best + at, best)
        tl.store(found.token + at, start + first + index)


@triton.jit
def finish(found, out, num_chunks, width: tl.constexpr):
    """Puts together what the chunks of a row without filters found. Grid (R)."""
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, width)
    top = tl.max(tl.load(found.top + row * num_chunks + chunks, mask=chunks < num_chunks, other=-INF), 0)
    bad = tl.abs(top) == INF
    token = pick(found, row, num_chunks, width)
    tl.store(out.bad + row, bad.to(tl.uint8))
    tl.store(out.tokens + row, tl.where(bad, 0, token).to(tl.int64))


@triton.jit
def settle(
    logits,
    row_stride,
    vocab_size,
    knobs,
    found,
    scratch,
    out,
    sizes: tl.constexpr,
):
    """Finishes a row, or says that it is wide. Grid (R)."""
    row = tl.program_id(0).to(tl.int64)
    num_chunks = (vocab_size + sizes.chunk - 1) // sizes.chunk
    chunks = tl.arange(0, sizes.width)
    tops = tl.load(found.top + row * num_chunks + chunks, mask=chunks < num_chunks, other=-INF)
    top = tl.max(tops, 0)
    bad = tl.abs(top) == INF
    tl.store(out.bad + row, bad.to(tl.uint8))
    status = scalar(DONE)
    token = scalar(0)
    if not bad:
        if kind_of(knobs, row, vocab_size) == FILTERED:
            scale = tl.load(knobs.scale + row)
            most = top * scale
            mass = tl.load(found.mass + row * num_chunks + chunks, mask=chunks < num_chunks, other=0.0)
            mass = tl.sum((mass * tl.exp(tops * scale - most)).to(tl.float64), 0)
            maxima = found.maxima + row * num_chunks * (sizes.chunk // sizes.group)
            num_groups = (vocab_size + sizes.group - 1) // sizes.group
            all_groups: tl.constexpr = sizes.width * (sizes.chunk // sizes.group)
            groups = tl.arange(0, all_groups)
            maxima = tl.load(maxima + groups, mask=groups < num_groups, other=-INF) * scale
            cut, few = first_cut(maxima, most, mass, knobs, row, vocab_size, sizes)
            live = (maxima >= cut) & (maxima > -INF)
            num_live = tl.sum(live.to(tl.int32), 0)
            count = scalar(sizes.kept + 1)
            if few & (num_live <= sizes.live):
                place = scratch.groups + row * (sizes.live + sizes.kept)
                tl.store(place + tl.cumsum(live.to(tl.int32), 0) - 1, groups, mask=live)
                tl.debug_barrier()
                count = collect(
                    logits + row * row_stride, vocab_size, scale, cut, num_live, scratch, row, sizes
                )
                tl.debug_barrier()
            if count <= sizes.kept:
                token = draw_among(scratch, row, count, cut, most, mass, knobs, sizes, vocab_size)
            else:
                status = status_of(knobs, row, vocab_size)
        else:
            token = pick(found, row, num_chunks, sizes.width)
    tl.store(out.tokens + row, token.to(tl.int64))
    tl.store(out.status + row, status)


@triton.jit
def first_cut(maxima, most, mass, knobs, row, vocab_size, sizes: tl.constexpr):
    """A scaled logit that is not above the threshold, from the scaled maxima of all groups; and whether it helps.

    k groups have a token as great as the k-th greatest maximum, so the k-th greatest token is too. In the same way the
    maxima alone bound the probability above a value from below.
    """
    min_p, top_k, top_p = (
        tl.load(knobs.log_min_p + row),
        tl.load(knobs.top_k + row),
        tl.load(knobs.top_p + row),
    )
    cut = most + min_p
    few = top_k > 0
    low, high = key_of(-INF + 0 * most).to(tl.int64), key_of(most).to(tl.int64)
    keys = key_of(maxima)
    if top_k < vocab_size:
        few = top_k <= sizes.live
        if few:
            kth = lowest(keys, (maxima > -INF).to(tl.int32), top_k.to(tl.float64), low - 1, high)
            cut = tl.maximum(cut, float_of(kth.to(tl.int32)))
    elif min_p == -INF:
        weights = fixed(tl.exp(maxima - most))
        least = lowest(keys, weights, top_p.to(tl.float64) * mass * ONE, low, high)
        few = least > low + 1  # else even all maxima weigh too little
        cut = float_of(least.to(tl.int32))
    return cut, few


@triton.jit
def collect(logits, vocab_size, scale, cut, num_live, scratch, row, sizes: tl.constexpr):
    """Writes the live groups' tokens that are not below the cut to the scratch; how many, if `kept` is not exceeded."""
    per_tile: tl.constexpr = sizes.tile // sizes.group
    places = scratch.groups + row * (sizes.live + sizes.kept)
    values, tokens = scratch.scaled + row * sizes.kept, scratch.tokens + row * (sizes.live + sizes.kept)
    count = 0 * num_live
    start = 0 * num_live
    while (start < num_live) & (count <= sizes.kept):
        index = start + tl.arange(0, per_tile)
        groups = tl.load(places + index, mask=index < num_live, other=0)
        ids = groups[:, None] * sizes.group + tl.arange(0, sizes.group)[None, :]
        usable = (index < num_live)[:, None] & (ids < vocab_size)
        x = tl.load(logits + ids, mask=usable, other=-INF) * scale
        keep = tl.reshape((x >= cut) & (x > -INF), [sizes.tile]).to(tl.int32)
        at = count + tl.cumsum(keep, 0) - 1
        keep = (keep > 0) & (at < sizes.kept)
        tl.store(values + at, tl.reshape(x, [sizes.tile]), mask=keep)
        tl.store(tokens + at, tl.reshape(ids, [sizes.tile]), mask=keep)
        count = tl.max(at, 0) + 1
        start += per_tile
    return count


@triton.jit
def draw_among(scratch, row, count, cut, most, mass, knobs, sizes: tl.constexpr, vocab_size):
    """The token drawn from the `count` in the scratch, which are all that are not below `cut`."""
    index = tl.arange(0, sizes.kept)
    inside = index < count
    x = tl.load(scratch.scaled + row * sizes.kept + index, mask=inside, other=-INF)
    tokens = tl.load(scratch.tokens + row * (sizes.live + sizes.kept) + index, mask=inside, other=0)
    keys = key_of(x)
    min_p, top_k, top_p = (
        tl.load(knobs.log_min_p + row),
        tl.load(knobs.top_k + row),
        tl.load(knobs.top_p + row),
    )
    least, high = key_of(cut).to(tl.int64), key_of(most).to(tl.int64)
    if top_k < vocab_size:
        least = lowest(keys, inside.to(tl.int32), top_k.to(tl.float64), least - 1, high)
    if top_p < 1:
        weights = tl.where(inside & (keys >= least), fixed(tl.exp(x - most)), 0)
        total = mass * ONE
        if (top_k < vocab_size) | (min_p > -INF):  # the scan's mass is of all tokens
            total = tl.sum(weights, 0).to(tl.float64)
        least = lowest(keys, weights, top_p.to(tl.float64) * total, least - 1, high)
    scores = tl.where(inside & (keys >= least), x + noise_of(tokens, knobs, row), -INF)
    _, best = greatest(scores)
    return tl.load(scratch.tokens + row * (sizes.live + sizes.kept) + best)
