# mypy: disable-error-code="no-untyped-def"
"""Norms, rotary positions and activations as Triton kernels; float32 inside. Knows no launch.

Each row is computed by one program in one way, so that it does not depend on the other rows.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["num_inner"])
def norm(
    x, out, weight, bias, eps, offset, num_inner, x_stride, x_inner_stride, weight_stride,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """A row of out [N, num_inner, SIZE]: RMS norm, or layer norm where CENTRED. WIDTH: a power of two >= SIZE.

    The weight is row n % num_inner's, if its rows differ (weight_stride > 0).
    """
    row = tl.program_id(0).to(tl.int64)
    outer, inner = row // num_inner, row % num_inner
    columns = tl.arange(0, WIDTH)
    keep = columns < SIZE
    y = tl.load(x + outer * x_stride + inner * x_inner_stride + columns, mask=keep, other=0.0).to(tl.float32)
    if CENTRED:
        y = tl.where(keep, y - tl.sum(y, 0) / SIZE, 0.0)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / SIZE + eps)
    if weight is not None:
        at = weight + inner * weight_stride + columns
        y = y * (tl.load(at, mask=keep, other=0.0).to(tl.float32) + offset)
    if bias is not None:
        y = y + tl.load(bias + columns, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + columns, y, mask=keep)


@triton.jit
def add_norm(
    x, residual, total, out, weight, post, eps, offset, post_eps, post_offset, x_stride, residual_stride,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, POST: tl.constexpr,
):  # fmt: skip
    """A row of total [N, SIZE] = residual + x, and of out = its RMS norm; of x's RMS norm by `post`, where POST.

    Numbers are rounded wherever separate operations would store them.
    """
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    keep = columns < SIZE
    y = tl.load(x + row * x_stride + columns, mask=keep, other=0.0).to(tl.float32)
    if POST:
        y = y * tl.rsqrt(tl.sum(y * y, 0) / SIZE + post_eps)
        if post is not None:
            y = y * (tl.load(post + columns, mask=keep, other=0.0).to(tl.float32) + post_offset)
        y = y.to(x.dtype.element_ty).to(tl.float32)
    y += tl.load(residual + row * residual_stride + columns, mask=keep, other=0.0).to(tl.float32)
    y = y.to(total.dtype.element_ty)
    tl.store(total + row * SIZE + columns, y, mask=keep)
    y = y.to(tl.float32)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / SIZE + eps)
    if weight is not None:
        y = y * (tl.load(weight + columns, mask=keep, other=0.0).to(tl.float32) + offset)
    tl.store(out + row * SIZE + columns, y, mask=keep)


@triton.jit
def _weighted(weight, heads, keep, columns, inside, DIM: tl.constexpr):
    """weight [H, DIM] at some heads and columns, as [heads, columns]."""
    at = weight + heads[:, None] * DIM + columns[None, :]
    return tl.load(at, mask=keep[:, None] & inside[None, :], other=0.0)


@triton.jit
def turn(
    source, target, heads, keep, weight, cos, sin, position, eps,
    DIM: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr,
    IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Heads [N] at row pointers `source`, normalised where there is a weight [H, DIM], turned, to rows at `target`.

    HALF pairs of numbers turn; WIDTH and REST are powers of two that hold the pairs and the other numbers, or 0. Every
    number is loaded once and stored by who computed with it, so that no thread sees what another one stored.
    """
    pairs = tl.arange(0, WIDTH)
    inside = pairs < HALF
    first, second = (2 * pairs, 2 * pairs + 1) if INTERLEAVED else (pairs, pairs + HALF)
    mask = keep[:, None] & inside[None, :]
    a = tl.load(source[:, None] + first[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source[:, None] + second[None, :], mask=mask, other=0.0).to(tl.float32)
    if REST > 0 and (weight is not None or not IN_PLACE):
        others = 2 * HALF + tl.arange(0, REST)
        beside = keep[:, None] & (others < DIM)[None, :]
        rest = tl.load(source[:, None] + others[None, :], mask=beside, other=0.0).to(tl.float32)
    if weight is not None:
        squares = tl.sum(a * a + b * b, 1)
        if REST > 0:
            squares += tl.sum(rest * rest, 1)
        scale = tl.rsqrt(squares / DIM + eps)[:, None]
        a = a * scale * _weighted(weight, heads, keep, first, inside, DIM)
        b = b * scale * _weighted(weight, heads, keep, second, inside, DIM)
        if REST > 0:
            rest = rest * scale * _weighted(weight, heads, keep, others, others < DIM, DIM)
    if REST > 0 and (weight is not None or not IN_PLACE):
        tl.store(target[:, None] + others[None, :], rest, mask=beside)
    at = position * HALF + pairs
    c = tl.load(cos + at, mask=inside, other=0.0)[None, :]
    s = tl.load(sin + at, mask=inside, other=0.0)[None, :]
    tl.store(target[:, None] + first[None, :], a * c - b * s, mask=mask)
    tl.store(target[:, None] + second[None, :], b * c + a * s, mask=mask)


@triton.jit
def norm_rope(
    x, weight, cos, sin, positions, eps, x_stride, x_head_stride,
    HEADS: tl.constexpr, AT_ONCE: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
    REST: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """AT_ONCE heads of a token of x [T, HEADS, DIM], in place."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    rows = x + token * x_stride + heads * x_head_stride
    turn(
        rows, rows, heads, heads < HEADS, weight, cos, sin, tl.load(positions + token), eps,
        DIM, HALF, WIDTH, REST, INTERLEAVED, True,
    )  # fmt: skip


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def activate(x, KIND: tl.constexpr):
    """The activations of kernels/reference.py; KIND is one of ops.ACTIVATIONS' values."""
    if KIND == "silu":
        y = x * _sigmoid(x)
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":  # (1 + tanh(y)) / 2 = sigmoid(2 y)
        y = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "relu":
        y = tl.where(x > 0, x, tl.where(x == x, 0.0, x))
    elif KIND == "relu2":
        y = tl.where(x > 0, x * x, tl.where(x == x, 0.0, x))
    else:
        y = _sigmoid(x)
    return y


@triton.jit
def gated(gate, up, KIND: tl.constexpr):
    """act(gate) * up, or what else a gate lets through."""
    if KIND == "swiglu_oai":
        gate = tl.where(gate > 7.0, 7.0, gate)
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
        y = gate * _sigmoid(1.702 * gate) * (up + 1.0)
    else:
        y = activate(gate, KIND) * up
    return y


@triton.jit(do_not_specialize=["num_numbers"])
def act(x, out, num_numbers, KIND: tl.constexpr, COUNT: tl.constexpr):
    """COUNT numbers of the activation of x, flat."""
    at = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    keep = at < num_numbers
    y = activate(tl.load(x + at, mask=keep, other=0.0).to(tl.float32), KIND)
    tl.store(out + at, y, mask=keep)


@triton.jit
def act_mul(x, out, SIZE: tl.constexpr, KIND: tl.constexpr, COUNT: tl.constexpr):
    """COUNT columns of a row of out [N, SIZE] = act(x[:, :SIZE]) * x[:, SIZE:]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    keep = columns < SIZE
    gate = tl.load(x + row * (2 * SIZE) + columns, mask=keep, other=0.0).to(tl.float32)
    up = tl.load(x + row * (2 * SIZE) + SIZE + columns, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + columns, gated(gate, up, KIND), mask=keep)
