# mypy: disable-error-code="no-untyped-def"
"""What keeps a state of each sequence, as Triton kernels; float32 inside. Knows no launch.

A program owns a part of one sequence's state, goes through the sequence's positions, and leaves the state as it then
is. So nothing depends on other sequences, and a sequence's end may be anywhere: nobody need know it to launch.
"""

import triton
import triton.language as tl


@triton.jit
def recur(
    v, q, k, decay, beta, state, rows, starts, out, v_stride, q_stride, k_stride, state_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, KEYS: tl.constexpr,
    PIECE: tl.constexpr, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """PIECE columns of a head's matrix [DK, DV]. GROUP heads share a key; KEYS is a power of two >= DK.

    Sums over a column are within the program, in an order that its sizes alone decide.
    """
    sequence, head = tl.program_id(0), tl.program_id(1)
    columns = tl.program_id(2) * PIECE + tl.arange(0, PIECE)
    begin, end = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    if begin < end:
        keys = tl.arange(0, KEYS)
        has_key, has_column = keys < DK, columns < DV
        at = state + tl.load(rows + sequence).to(tl.int64) * state_stride + head * DK * DV
        at += keys[:, None] * DV + columns[None, :]
        inside = has_key[:, None] & has_column[None, :]
        matrix = tl.load(at, mask=inside, other=0.0)
        first, key_at = begin.to(tl.int64), head // GROUP * DK + keys
        q_at, k_at = q + first * q_stride + key_at, k + first * k_stride + key_at
        v_at = v + first * v_stride + head * DV + columns
        of_head = first * HEADS + head
        for _ in range(begin, end):
            query = tl.load(q_at, mask=has_key, other=0.0).to(tl.float32)
            key = tl.load(k_at, mask=has_key, other=0.0).to(tl.float32)
            value = tl.load(v_at, mask=has_column, other=0.0).to(tl.float32)
            if PER_CHANNEL:
                matrix *= tl.load(decay + of_head * DK + keys, mask=has_key, other=0.0)[:, None]
            else:
                matrix *= tl.load(decay + of_head)
            if beta is not None:
                value = (value - tl.sum(matrix * key[:, None], 0)) * tl.load(beta + of_head)
            matrix += key[:, None] * value[None, :]
            tl.store(out + of_head * DV + columns, tl.sum(matrix * query[:, None], 0), mask=has_column)
            q_at += q_stride
            k_at += k_stride
            v_at += v_stride
            of_head += HEADS
        tl.store(at, matrix, mask=inside)


@triton.jit
def _seen(x, before, p, begin, channels, keep, x_stride, WIDTH: tl.constexpr):
    """Inputs at positions p [N] of a sequence that begins at `begin`: x's, or earlier ones from its state."""
    now = x + p.to(tl.int64)[:, None] * x_stride + channels[None, :]
    early = before + channels[None, :] * (WIDTH - 1) + (p - begin + WIDTH - 1)[:, None]
    is_new = (p >= begin)[:, None]
    new = tl.load(now, mask=keep & is_new, other=0.0)
    return tl.where(is_new, new, tl.load(early, mask=keep & (is_new == 0), other=0.0))


@triton.jit
def convolve(
    x, weight, bias, state, rows, starts, out, x_stride, state_stride,
    CHANNELS: tl.constexpr, PIECE: tl.constexpr, WIDTH: tl.constexpr, ROUND: tl.constexpr, AT_ONCE: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """PIECE of CHANNELS, AT_ONCE positions at a time. ROUND is a power of two >= WIDTH - 1."""
    sequence, channels = tl.program_id(0), tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    begin, end = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    if begin < end:
        inside = channels < CHANNELS
        before = state + tl.load(rows + sequence).to(tl.int64) * state_stride
        for first in range(begin, end, AT_ONCE):
            t = first + tl.arange(0, AT_ONCE)
            keep = (t < end)[:, None] & inside[None, :]
            y = tl.zeros((AT_ONCE, PIECE), tl.float32)
            for j in tl.static_range(WIDTH):
                w = tl.load(weight + channels * WIDTH + j, mask=inside, other=0.0).to(tl.float32)
                seen = _seen(x, before, t - (WIDTH - 1) + j, begin, channels, keep, x_stride, WIDTH)
                y += seen.to(tl.float32) * w[None, :]
            if bias is not None:
                y += tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)[None, :]
            if SILU:
                y = y / (1.0 + tl.exp(-y))
            tl.store(out + t.to(tl.int64)[:, None] * CHANNELS + channels[None, :], y, mask=keep)
        j = tl.arange(0, ROUND)
        keep = (j < WIDTH - 1)[:, None] & inside[None, :]
        last = _seen(x, before, end - (WIDTH - 1) + j, begin, channels, keep, x_stride, WIDTH)
        tl.debug_barrier()  # all threads have read the state before one of them writes it
        tl.store(before + channels[None, :] * (WIDTH - 1) + j[:, None], last, mask=keep)
