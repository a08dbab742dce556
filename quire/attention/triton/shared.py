# mypy: disable-error-code="no-untyped-def"
"""Attention to the beginning that sequences have in common: its keys are read once for all of them.

Queries of up to SEQS sequences are the rows of a tile; the keys are divided among SPLITS programs. What each of them
has is left in memory, for the decode kernel to go on from.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from quire.attention.triton.tiles import (
    FLOOR,
    accumulate,
    columns_of,
    page_ids,
    scores_of,
    start_state,
    store_rows,
    token_pointers,
    two_parts,
)


class Left(NamedTuple):
    """What is left to the decode kernel, for S sequences."""

    num_pages: Tensor  # [S] int32: how much of it each sequence has in common with others
    numbers: Tensor  # [SPLITS, S, HEADS, V0 + V1] float32
    sums: Tensor  # [SPLITS, S, HEADS, 2] float32: greatest score, sum of weights


@triton.jit
def tiles_in_common(num_pages, PAGE: tl.constexpr, TILE: tl.constexpr):
    """Whole tiles of keys; the rest is each sequence's own business."""
    return num_pages * PAGE // TILE


@triton.jit(do_not_specialize=["num_seqs", "table_stride"])
def attend(
    q, k, v, tables, starts, members, member_pages, left, scale, cap, num_seqs, q_stride, q_head_stride,
    table_stride, k_stride, v_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SEQS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K_DIM: tl.constexpr, K_STORED: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, V_DIM: tl.constexpr, V_STORED: tl.constexpr,
    V_IS_K0: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fill `left`. Grid (groups * PARTS * key heads, SPLITS); a group's members [SEQS] are rows, -1 for nobody."""
    num_kv_heads: tl.constexpr = HEADS // GROUP
    head, part = tl.program_id(0) % num_kv_heads, tl.program_id(0) // num_kv_heads % PARTS
    group = tl.program_id(0) // (num_kv_heads * PARTS)
    num_tiles = tiles_in_common(tl.load(member_pages + group), PAGE, TILE)
    share = (num_tiles + tl.num_programs(1) - 1) // tl.num_programs(1)
    first = tl.program_id(1) * share
    stop = tl.minimum(first + share, num_tiles)
    if first < stop:
        rows = part * ROWS + tl.arange(0, ROWS)
        seqs = tl.load(members + group * SEQS + rows // GROUP, mask=rows < SEQS * GROUP, other=-1)
        keep, heads = seqs >= 0, head * GROUP + rows % GROUP
        at = tl.load(starts + seqs, mask=keep, other=0).to(tl.int64) * q_stride + heads * q_head_stride
        q0, q1 = two_parts(q + at, keep, K0, K1, K_DIM)
        acc0, acc1, m, total = start_state(None, heads, keep, ROWS, V0, V1)
        table = tables + tl.load(members + group * SEQS).to(tl.int64) * table_stride
        last = (stop * TILE - 1) // PAGE
        following = page_ids(table, first, last, PAGE, TILE)
        every = tl.full([TILE], True, tl.int1)
        for tile in tl.range(first, stop, num_stages=STAGES):
            pages = following
            following = page_ids(table, tile + 1, last, PAGE, TILE)
            keys = token_pointers(k, pages, tile, k_stride, head, K_STORED, PAGE, TILE)
            k0, k1 = two_parts(keys, every, K0, K1, K_DIM)
            s, factor = scores_of(q0, q1, k0, k1, scale, cap, K1, CAPPED, PRECISION)
            if V_IS_K0:
                v0, v1 = k0, k0
            else:
                values = token_pointers(v, pages, tile, v_stride, head, V_STORED, PAGE, TILE)
                v0, v1 = two_parts(values, every, V0, V1, V_DIM)
            acc0, acc1, m, total = accumulate(acc0, acc1, m, total, s, factor, v0, v1, V1, PRECISION)
        places = (tl.program_id(1).to(tl.int64) * num_seqs + seqs) * HEADS + heads
        store_rows(left.numbers + places * (V0 + V1), keep, acc0, acc1, V0, V1, V0 + V1)
        tl.store(left.sums + places * 2, m, mask=keep)
        tl.store(left.sums + places * 2 + 1, total, mask=keep)


@triton.jit
def add_left(
    acc0, acc1, m, total, left, num_tiles, seq, num_seqs, heads, keep,
    HEADS: tl.constexpr, SPLITS: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
):  # fmt: skip
    """The state of a sequence's rows, heads [N], with what `attend` left of its `num_tiles` tiles in common."""
    share = tl.maximum((num_tiles + SPLITS - 1) // SPLITS, 1)
    for split in range((num_tiles + share - 1) // share):
        places = (tl.cast(split, tl.int64) * num_seqs + seq) * HEADS + heads
        their_m = tl.load(left.sums + places * 2, mask=keep, other=FLOOR)
        their_total = tl.load(left.sums + places * 2 + 1, mask=keep, other=0.0)
        new = tl.maximum(m, their_m)
        fade, weight = tl.exp2(m - new), tl.exp2(their_m - new)
        rows = left.numbers + places * (V0 + V1)
        total = total * fade + their_total * weight
        acc0 = acc0 * fade[:, None] + columns_of(rows, keep, 0, V0, V0 + V1) * weight[:, None]
        if V1 > 0:
            acc1 = acc1 * fade[:, None] + columns_of(rows, keep, V0, V1, V0 + V1) * weight[:, None]
        m = new
    return acc0, acc1, m, total
