# mypy: disable-error-code="no-untyped-def"
"""Attention of any number of queries per sequence: tiles of queries, each of which reads all keys that it sees.

A row's result is the same bits whatever else is computed beside it and however its prompt was cut into chunks: its
keys are read in tiles counted from the sequence's start, and a tile that it does not see changes nothing.
"""

import triton
import triton.language as tl

from quire.attention.triton.tiles import (
    accumulate,
    logarithm,
    page_ids,
    scores_of,
    start_state,
    store_rows,
    token_pointers,
    two_parts,
    zero_padding,
)


@triton.jit
def _owner(starts, num_seqs, tile, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """(sequence, its first tile) of a tile of queries, without a list of tiles.

    Sequence s has its tiles from starts[s] * GROUP // ROWS + s on, which leaves room for all of them; some numbers
    are nobody's.
    """
    low = tile * 0
    high = low + num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        here = tl.load(starts + middle) * GROUP // ROWS + middle <= tile
        low = tl.where(here, middle, low)
        high = tl.where(here, high, middle)
    return low, tl.load(starts + low) * GROUP // ROWS + low


@triton.jit
def _tile_of(
    pool, described, pages, tile, keep, stride, head,
    W0: tl.constexpr, W1: tl.constexpr, DIM: tl.constexpr, STORED: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Both parts of a tile of keys or values, by a tensor descriptor where there is one."""
    if described is None:
        at = token_pointers(pool, pages, tile, stride, head, STORED, PAGE, TILE)
        part0, part1 = two_parts(at, keep, W0, W1, DIM)
    else:
        part0 = described.load([pages, head * PAGE + tile * TILE % PAGE, 0]).reshape([TILE, W0])
        if MASKED:
            part0 = tl.where(keep[:, None], part0, 0.0)
        part1 = part0
    return part0, part1


@triton.jit
def _sweep(
    acc0, acc1, m, total, q0, q1, k, v, k_described, v_described, table, low, until, length, first, stop, head,
    scale, cap, k_stride, v_stride,
    PAGE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K_DIM: tl.constexpr, K_STORED: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, V_DIM: tl.constexpr, V_STORED: tl.constexpr,
    V_IS_K0: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """The state after tiles first .. stop, of which rows see low .. until; all of it where they are not MASKED."""
    last = (length - 1) // PAGE
    oldest = tl.min(low, 0)
    following = page_ids(table, first, last, PAGE, TILE)
    for tile in tl.range(first, stop, num_stages=STAGES):
        pages = following
        following = page_ids(table, tile + 1, last, PAGE, TILE)
        tokens = tile * TILE + tl.arange(0, TILE)
        # Past the length, and before windows, lies whatever was left there, not a number perhaps.
        cached = tokens < length if MASKED else tl.full([TILE], True, tl.int1)
        if MASKED and WINDOWED:
            cached = cached & (tokens >= oldest)
        k0, k1 = _tile_of(
            k, k_described, pages, tile, cached, k_stride, head, K0, K1, K_DIM, K_STORED, PAGE, TILE, False
        )
        s, factor = scores_of(q0, q1, k0, k1, scale, cap, K1, CAPPED, PRECISION)
        if MASKED:
            seen = tokens[None, :] < until[:, None]
            if WINDOWED:
                seen = seen & (tokens[None, :] >= low[:, None])
            s = tl.where(seen, s, -float("inf"))
        if V_IS_K0:
            v0, v1 = k0, k0
        else:
            v0, v1 = _tile_of(
                v, v_described, pages, tile, cached, v_stride, head, V0, V1, V_DIM, V_STORED, PAGE, TILE, MASKED
            )  # fmt: skip
        acc0, acc1, m, total = accumulate(acc0, acc1, m, total, s, factor, v0, v1, V1, PRECISION)
    return acc0, acc1, m, total


@triton.jit(do_not_specialize=["num_seqs", "num_rows", "least", "window", "table_stride"])
def prefill(
    q, k, v, k_described, v_described, tables, lengths, starts, until, since, least,
    out, weighs, sinks, scale, cap, window,
    num_seqs, num_rows, q_stride, q_head_stride, table_stride, k_stride, v_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K_DIM: tl.constexpr, K_STORED: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, V_DIM: tl.constexpr, V_STORED: tl.constexpr,
    V_IS_K0: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """out [T, HEADS, V_DIM] of q [T, HEADS, K_DIM]: one program's tile of ROWS rows of one key head.

    Rows of sequences that have fewer than `least` queries are another kernel's; `weighs` as in decode.py, and `until`
    and `since`, or None, as in base.py.
    """
    zero_padding(out, starts, num_seqs, num_rows, HEADS * V_DIM)
    num_kv_heads: tl.constexpr = HEADS // GROUP
    head = tl.program_id(0) % num_kv_heads
    # The last tiles of a sequence read the most, so they start first.
    query_tile = tl.num_programs(0) // num_kv_heads - 1 - tl.program_id(0) // num_kv_heads
    seq, first_tile = _owner(starts, num_seqs, query_tile, GROUP, ROWS)
    first_row = tl.load(starts + seq)
    num_queries = tl.load(starts + seq + 1) - first_row
    x = (query_tile - first_tile) * ROWS
    if (x < num_queries * GROUP) & (num_queries >= least):
        length = tl.load(lengths + seq)
        rows = x + tl.arange(0, ROWS)
        keep = rows < num_queries * GROUP
        heads = head * GROUP + rows % GROUP
        at = (first_row + rows // GROUP).to(tl.int64)
        q0, q1 = two_parts(q + at * q_stride + heads * q_head_stride, keep, K0, K1, K_DIM)
        acc0, acc1, m, total = start_state(sinks, heads, keep, ROWS, V0, V1)
        positions = length - num_queries + rows // GROUP
        begin = length - num_queries + x // GROUP
        ends, low = positions + 1, positions - window + 1
        if until is not None:
            ends = tl.load(until + at, mask=keep, other=0)
        if since is not None:
            low = tl.minimum(low, tl.load(since + at, mask=keep, other=length))
        end = tl.minimum(tl.max(ends, 0), length)
        table = tables + seq.to(tl.int64) * table_stride
        full = (begin + 1) // TILE  # tiles that the first row sees whole, and so all do
        if WINDOWED:
            full = tl.maximum(tl.min(low, 0), 0) // TILE  # all tiles are masked: a window is few of them
        else:
            acc0, acc1, m, total = _sweep(
                acc0, acc1, m, total, q0, q1, k, v, k_described, v_described, table, low, ends, length, 0, full,
                head, scale, cap, k_stride, v_stride, PAGE, TILE, STAGES, K0, K1, K_DIM, K_STORED,
                V0, V1, V_DIM, V_STORED, V_IS_K0, CAPPED, PRECISION, False, False,
            )  # fmt: skip
        acc0, acc1, m, total = _sweep(
            acc0, acc1, m, total, q0, q1, k, v, k_described, v_described, table, low, ends, length, full,
            (end + TILE - 1) // TILE, head, scale, cap, k_stride, v_stride, PAGE, TILE, STAGES,
            K0, K1, K_DIM, K_STORED, V0, V1, V_DIM, V_STORED, V_IS_K0, CAPPED, PRECISION, True, WINDOWED,
        )  # fmt: skip
        acc0, acc1 = acc0 / total[:, None], acc1 / total[:, None]
        store_rows(out + (at * HEADS + heads) * V_DIM, keep, acc0, acc1, V0, V1, V_DIM)
        if weighs is not None:
            tl.store(weighs + at * HEADS + heads, logarithm(m, total), mask=keep)
