# mypy: disable-error-code="no-untyped-def"
"""Stores a step's keys and values in their pages."""

import triton
import triton.language as tl

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
