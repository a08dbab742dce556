# mypy: disable-error-code="no-untyped-def"
"""Products of tokens with the weights of their experts, as Triton kernels. Knows no launch.

Few tokens: each (token, choice) pair has programs of its own, which read its expert's weight as linear.one_row does.

    x [T, dim] ──alone_up──> hidden [pairs, hidden] ──alone_down──> out [T, dim], or residual sum and unscaled norm

More: the pairs of an expert share its weight, ROWS of them at a time; see routing.py.

    x [T, dim] ──together──> hidden, in their order ──together──> [pairs, dim] ──combine──> out, or sum and norm

Sums are float32; a token's experts are added up in the order of its choices, then the shared one, then the residual.
All of it is one order for given sizes and tiles, whichever experts are chosen and whoever else is there.

HELD is how many experts have weights here, if others, of higher numbers, may be chosen that have not; 0 if all have.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from quire.kernels.triton.elementwise import activate, gated
from quire.kernels.triton.linear import LATE, follow, inputs_at, inverse_rms, weights_at


@triton.jit
def _hidden(y, up, bias, columns, inside, N, ACT: tl.constexpr, GATED: tl.constexpr):
    """What gates y let through, or act(y), of columns along the first dimension; with an expert's bias [2 N] or [N]."""
    if bias is not None:
        y += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[:, None]
        if GATED:
            up += tl.load(bias + N + columns, mask=inside, other=0.0).to(tl.float32)[:, None]
    if GATED:
        y = gated(y, up, ACT)
    elif ACT != "":
        y = activate(y, ACT)
    return y


@triton.jit
def _add_shared(y, shared, shared_gate, token, columns, inside, N):
    """y [columns] and what the shared expert made of the token, times the sigmoid of its gate."""
    if shared is not None:
        at = shared + token * N + columns
        z = tl.load(at, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
        if shared_gate is not None:
            z *= activate(tl.load(shared_gate + token, cache_modifier=".cg").to(tl.float32), "sigmoid")
        y += z
    return y


@triton.jit
def _some(x, k, inputs, K, EVEN: tl.constexpr):
    """A step of a row, float32 [1, STEP]."""
    if EVEN:
        some = tl.load(x + k + inputs, cache_modifier=".cg")
    else:
        some = tl.load(x + k + inputs, mask=k + inputs < K, other=0.0, cache_modifier=".cg")
    return some.to(tl.float32)[None, :]


@triton.jit
def alone_up(
    x, w, bias, out, experts, squares, x_stride, num_tokens, num_parts, eps,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
    UNROLL: tl.constexpr, PARTS: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr,
    HELD: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    """A tile of out [pairs, N] for a pair: what its expert's w [E, (2) N, K] makes of row pair // TOP_K of x."""
    tiles: tl.constexpr = (N + TILE - 1) // TILE
    halves: tl.constexpr = 2 if GATED else 1
    pair, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    token = pair // TOP_K
    columns, inputs = tile * TILE + tl.arange(0, TILE), tl.arange(0, STEP)
    follow(NEXT)
    expert = tl.load(experts + pair, cache_modifier=".cg").to(tl.int64)
    if HELD > 0:  # noqa: SIM102  (known while compiling)
        if expert >= HELD:
            return
    w_at = w + expert * (halves * N * K) + tl.minimum(columns, N - 1)[:, None] * K + inputs[None, :]
    x_at = x + token.to(tl.int64) * x_stride
    y = tl.zeros([TILE, STEP], tl.float32)
    up = tl.zeros([TILE, STEP], tl.float32)
    for k in tl.range(0, K, STEP, loop_unroll_factor=UNROLL):
        weights = weights_at(w_at, k, inputs, K, EVEN)
        if GATED:
            ups = weights_at(w_at + N * K, k, inputs, K, EVEN)
        some = _some(x_at, k, inputs, K, EVEN)
        y += weights.to(tl.float32) * some
        if GATED:
            up += ups.to(tl.float32) * some
    y = tl.sum(y, 1)[:, None]
    up = tl.sum(up, 1)[:, None]
    if NEXT == LATE:
        gdc_launch_dependents()
    if squares is not None:
        rows = token + tl.arange(0, 1)
        scale = inverse_rms(squares, rows, num_tokens, num_parts, K, eps, PARTS)[None, :]
        y = y * scale
        up = up * scale
    if bias is not None:
        bias += expert * (halves * N)
    inside = columns < N
    y = _hidden(y, up, bias, columns, inside, N, ACT, GATED)
    at = pair.to(tl.int64) * N + columns[:, None] + tl.arange(0, 1)[None, :]
    tl.store(out + at, y, mask=inside[:, None])


@triton.jit
def alone_down(
    x, w, bias, out, experts, weights, shared, shared_gate, residual, total, gain, new_squares, offset,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
    UNROLL: tl.constexpr, EVEN: tl.constexpr, HELD: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    """A tile of out [T, N] for a token: the weighed sum over its rows of x [T * TOP_K, K], and what linear.py adds."""
    tiles: tl.constexpr = (N + TILE - 1) // TILE
    token, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    columns, inputs = tile * TILE + tl.arange(0, TILE), tl.arange(0, STEP)
    inside = columns < N
    rows = tl.minimum(columns, N - 1)[:, None] * K + inputs[None, :]
    follow(NEXT)
    y = tl.zeros([TILE, STEP], tl.float32)
    biases = tl.zeros([TILE], tl.float32)
    for j in tl.static_range(TOP_K):
        pair = token * TOP_K + j
        expert = tl.load(experts + pair, cache_modifier=".cg").to(tl.int64)
        weight = tl.load(weights + pair, cache_modifier=".cg")
        end, held = K, inside
        if HELD > 0:
            end = tl.where(expert < HELD, K, 0)
            held = inside & (expert < HELD)
        w_at = w + expert * (N * K) + rows
        for k in tl.range(0, end, STEP, loop_unroll_factor=UNROLL):
            some = _some(x + pair * K, k, inputs, K, EVEN) * weight
            y += weights_at(w_at, k, inputs, K, EVEN).to(tl.float32) * some
        if bias is not None:
            theirs = tl.load(bias + expert * N + columns, mask=held, other=0.0).to(tl.float32)
            biases += theirs * weight
    if NEXT == LATE:
        gdc_launch_dependents()
    y = _add_shared(tl.sum(y, 1) + biases, shared, shared_gate, token, columns, inside, N)
    at = token * N + columns
    if residual is not None:
        y += tl.load(residual + at, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
        tl.store(total + at, y, mask=inside)
        tl.store(new_squares + token * tiles + tile, tl.sum(tl.where(inside, y * y, 0.0), 0))
        if gain is not None:
            y = y * (tl.load(gain + columns, mask=inside, other=0.0).to(tl.float32) + offset)
    tl.store(out + at, y, mask=inside)


@triton.jit
def _weights(at, k, inputs, K, EVEN: tl.constexpr, TURNS: tl.constexpr):
    """A step of w, which is kept in a cache where several slots take turns."""
    if TURNS == 1:
        w = weights_at(at, k, inputs, K, EVEN)
    elif EVEN:
        w = tl.load(at + k)
    else:
        w = tl.load(at + k, mask=(inputs + k < K)[None, :], other=0.0)
    return w


@triton.jit(do_not_specialize=["num_slots", "num_tokens"])
def together(
    x, w, bias, out, order, slots, squares, num_slots, num_tokens, x_stride, N, K, num_parts, eps,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
    TURNS: tl.constexpr, PARTS: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, FROM_TOKENS: tl.constexpr,
    EVEN: tl.constexpr, NEXT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of out for the pairs of a slot, as y^T [TILE, ROWS]; w is [E, (2) N, K].

    FROM_TOKENS: rows of x are tokens' and those of out in the order of `order`; else x is so, and out pair by pair.
    TURNS slots take turns at a tile of the weight, while it is in the second-level cache.
    """
    tiles = tl.cdiv(N, TILE)
    turn = tl.program_id(0) // (TURNS * tiles)
    slot = turn * TURNS + tl.program_id(0) % TURNS
    tile = tl.program_id(0) % (TURNS * tiles) // TURNS
    if slot >= num_slots:
        return
    follow(NEXT)
    expert = tl.load(slots + slot, cache_modifier=".cg").to(tl.int64)
    if expert < 0:
        return
    places = tl.load(slots + num_slots + slot, cache_modifier=".cg") + tl.arange(0, ROWS)
    inside = places < tl.load(slots + 2 * num_slots + slot, cache_modifier=".cg")
    pairs = tl.load(order + places, mask=inside, other=0, cache_modifier=".cg")
    columns, inputs = tile * TILE + tl.arange(0, TILE), tl.arange(0, STEP)
    halves: tl.constexpr = 2 if GATED else 1
    size = tl.cast(N, tl.int64) * K
    # Columns past the end multiply the last one again, as in linear.stream.
    w_at = w + expert * halves * size + tl.minimum(columns, N - 1).to(tl.int64)[:, None] * K + inputs[None, :]
    sources = pairs // TOP_K if FROM_TOKENS else places
    x_at = x + sources.to(tl.int64)[:, None] * x_stride + inputs[None, :]
    y = tl.zeros([TILE, ROWS], tl.float32)
    up = tl.zeros([TILE, ROWS], tl.float32)
    for k in tl.range(0, K, STEP, num_stages=STAGES):
        some = tl.trans(inputs_at(x_at, k, inside[:, None], inputs, K, EVEN))
        y = tl.dot(_weights(w_at, k, inputs, K, EVEN, TURNS), some, y, input_precision=PRECISION)
        if GATED:
            ups = _weights(w_at + size, k, inputs, K, EVEN, TURNS)
            up = tl.dot(ups, some, up, input_precision=PRECISION)
    if NEXT == LATE:
        gdc_launch_dependents()
    if squares is not None:
        tokens = tl.where(inside, pairs // TOP_K, num_tokens)
        scale = inverse_rms(squares, tokens, num_tokens, num_parts, K, eps, PARTS)[None, :]
        y = y * scale
        if GATED:
            up = up * scale
    if bias is not None:
        bias += expert * (halves * N)
    y = _hidden(y, up, bias, columns, columns < N, N, ACT, GATED)
    targets = places if FROM_TOKENS else pairs
    at = targets.to(tl.int64)[None, :] * N + columns[:, None]
    tl.store(out + at, y, mask=(columns < N)[:, None] & inside[None, :])


@triton.jit
def combine(
    x, out, experts, weights, shared, shared_gate, residual, total, gain, eps, offset, residual_stride,
    TOP_K: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, HELD: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    """A row of out [T, SIZE]: the weighed sum of x [T * TOP_K, SIZE], or its sum with the residual, normalised."""
    token, columns = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside = columns < SIZE
    follow(NEXT)
    y = tl.zeros([WIDTH], tl.float32)
    for j in tl.static_range(TOP_K):
        pair, held = token * TOP_K + j, inside
        if HELD > 0:
            held = inside & (tl.load(experts + pair, cache_modifier=".cg") < HELD)
        theirs = tl.load(x + pair * SIZE + columns, mask=held, other=0.0, cache_modifier=".cg")
        y += theirs.to(tl.float32) * tl.load(weights + pair, cache_modifier=".cg")
    y = _add_shared(y, shared, shared_gate, token, columns, inside, SIZE)
    if residual is not None:
        at = residual + token * residual_stride + columns
        y += tl.load(at, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
        y = y.to(total.dtype.element_ty)
        tl.store(total + token * SIZE + columns, y, mask=inside)
        y = y.to(tl.float32)
        y = y * tl.rsqrt(tl.sum(y * y, 0) / SIZE + eps)
        if gain is not None:
            y = y * (tl.load(gain + columns, mask=inside, other=0.0).to(tl.float32) + offset)
    tl.store(out + token * SIZE + columns, y, mask=inside)
