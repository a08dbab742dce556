# mypy: disable-error-code="no-untyped-def"
"""Stores a step's keys and values in their pages, as they are or turned by their positions."""

import triton
import triton.language as tl

from quire.kernels.triton.elementwise import turn

BLOCK = 1024  # numbers that a program stores


@triton.jit
def _copy(x, pool, token, slot, x_stride, x_head_stride, stride, HEADS: tl.constexpr, DIM: tl.constexpr,
          STORED: tl.constexpr, PAGE: tl.constexpr, COUNT: tl.constexpr):  # fmt: skip
    """One program's COUNT numbers of x[token], [HEADS, DIM] each, to the slot's place."""
    numbers = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    keep = numbers < HEADS * DIM
    heads, columns = numbers // DIM, numbers % DIM
    values = tl.load(x + token * x_stride + heads * x_head_stride + columns, mask=keep)
    rows = heads * PAGE + slot % PAGE
    tl.store(pool + slot // PAGE * stride + rows * STORED + columns, values, mask=keep)


@triton.jit
def write(
    k, v, k_pool, v_pool, slots, k_token_stride, k_head_stride, v_token_stride, v_head_stride, k_stride, v_stride,
    HEADS: tl.constexpr, PAGE: tl.constexpr, K_DIM: tl.constexpr, K_STORED: tl.constexpr,
    V_DIM: tl.constexpr, V_STORED: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """k [T, HEADS, K_DIM] and v [T, HEADS, V_DIM], or None, to slots [T] int64, nowhere where negative."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot >= 0:
        _copy(
            k, k_pool, token, slot, k_token_stride, k_head_stride, k_stride, HEADS, K_DIM, K_STORED, PAGE, COUNT
        )  # fmt: skip
        if v is not None:
            _copy(
                v, v_pool, token, slot, v_token_stride, v_head_stride, v_stride, HEADS, V_DIM, V_STORED, PAGE, COUNT
            )  # fmt: skip


@triton.jit
def place(
    x, k_pool, v_pool, slots, positions, weight, cos, sin, eps, x_stride, x_head_stride, k_stride, v_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, AT_ONCE: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr,
    STORED: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, COLUMNS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """AT_ONCE heads of a token of x [T, HEADS + 2 * KV_HEADS, DIM]: queries in place, keys and values to slots [T].

    Axis 1: programs of queries, of keys, of values. Queries of tokens whose slot is negative turn all the same.
    """
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    groups: tl.constexpr = (HEADS + AT_ONCE - 1) // AT_ONCE
    kv_groups: tl.constexpr = (KV_HEADS + AT_ONCE - 1) // AT_ONCE
    slot = tl.load(slots + token)
    local = tl.arange(0, AT_ONCE)
    row = x + token * x_stride
    if group < groups:
        heads = group * AT_ONCE + local
        rows = row + heads * x_head_stride
        turn(
            rows, rows, heads, heads < HEADS, weight, cos, sin, tl.load(positions + token), eps,
            DIM, HALF, WIDTH, REST, INTERLEAVED, True,
        )  # fmt: skip
    elif group < groups + kv_groups:
        heads = (group - groups) * AT_ONCE + local
        rows = row + (HEADS + heads) * x_head_stride
        target = k_pool + slot // PAGE * k_stride + (heads * PAGE + slot % PAGE) * STORED
        turn(
            rows, target, HEADS + heads, (heads < KV_HEADS) & (slot >= 0), weight, cos, sin,
            tl.load(positions + token), eps, DIM, HALF, WIDTH, REST, INTERLEAVED, False,
        )  # fmt: skip
    else:
        heads, columns = (group - groups - kv_groups) * AT_ONCE + local, tl.arange(0, COLUMNS)
        rows = row + (HEADS + KV_HEADS + heads) * x_head_stride
        target = v_pool + slot // PAGE * v_stride + (heads * PAGE + slot % PAGE) * STORED
        keep = ((heads < KV_HEADS) & (slot >= 0))[:, None] & (columns < DIM)[None, :]
        values = tl.load(rows[:, None] + columns[None, :], mask=keep)
        tl.store(target[:, None] + columns[None, :], values, mask=keep)
