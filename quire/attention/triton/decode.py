# mypy: disable-error-code="no-untyped-def"
"""Attention of few queries per sequence: the keys are what is many, so they are divided among the programs.

All tiles of all (sequence, head group) pairs form one line, cut into as many equal pieces as there are programs:

    tiles    | seq 0 head 0 | seq 0 head 1 | seq 1 head 0 | ..
    programs | 0      | 1      | 2      | 3      | ..

A pair within one piece is finished there. Else each program leaves what it has in `partials`, and the last one to
arrive merges in the order of the tiles, so that results do not depend on who was last.

`work` int32: | tiles per program, tiles in all | first sequence of each program | tiles before each sequence |
arrivals of each pair |. It is made on the device, so that nothing here depends on what lengths are on the host.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from quire.attention.triton.shared import add_left, tiles_in_common
from quire.attention.triton.tiles import (
    FLOOR,
    accumulate,
    extent,
    fresh_columns,
    logarithm,
    page_ids,
    scores_of,
    start_state,
    store_rows,
    token_pointers,
    turned_parts,
    two_parts,
    zero_padding,
)
from quire.kernels.triton.linear import LATE, follow

SEQS = tl.constexpr(128)
PROGRAMS = 64  # of the line's pieces, per program of `divide`


@triton.jit
def _num_tiles(
    lengths, starts, common, first, num_seqs, most, window, PAGE: tl.constexpr, TILE: tl.constexpr
):
    """(sequences first .. first + SEQS, which of them are there, their own tiles for each head)."""
    seqs = first + tl.arange(0, SEQS)
    there = seqs < num_seqs
    begin = tl.load(starts + seqs, mask=there, other=0)
    count = tl.load(starts + seqs + 1, mask=there, other=0) - begin
    count = tl.where(count > most, 0, count)
    length = tl.load(lengths + seqs, mask=there, other=0)
    _, tiles = extent(length, count, window, TILE)
    if common is not None:
        ahead = tiles_in_common(tl.load(common + seqs, mask=there, other=0), length, PAGE, TILE)
        tiles = tl.where(count > 0, tiles - ahead, 0)
    return seqs, there, tiles


@triton.jit(do_not_specialize=["num_seqs", "num_programs", "most", "window"])
def divide(
    lengths, starts, common, work, num_seqs, num_heads, num_programs, most, window,
    PAGE: tl.constexpr, TILE: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Fill `work`, with nothing of sequences that have more than `most` queries, nor of pages in `common` [S], or None.

    Each program finds the first sequences of COUNT pieces; program 0 does the rest too.
    """
    program = tl.program_id(0)
    all_tiles = tl.zeros([SEQS], tl.int32)
    for first in range(0, num_seqs, SEQS):
        _, _, tiles = _num_tiles(lengths, starts, common, first, num_seqs, most, window, PAGE, TILE)
        all_tiles += tiles * num_heads
    total = tl.sum(all_tiles, 0)
    share = tl.maximum((total + num_programs - 1) // num_programs, 1)
    if program == 0:
        tl.store(work, share)
        tl.store(work + 1, total)
    pieces = program * COUNT + tl.arange(0, COUNT)
    owners = tl.zeros([COUNT], tl.int32)
    before = total * 0
    begins = work + 2 + num_programs
    for first in range(0, num_seqs, SEQS):
        seqs, there, tiles = _num_tiles(lengths, starts, common, first, num_seqs, most, window, PAGE, TILE)
        ends = before + tl.cumsum(tiles * num_heads, 0)
        passed = there[None, :] & (ends[None, :] <= (pieces * share)[:, None])
        owners += tl.sum(passed.to(tl.int32), 1)
        if program == 0:
            tl.store(begins + seqs, ends - tiles * num_heads, mask=there)
            for head in range(num_heads):
                tl.store(begins + num_seqs + seqs * num_heads + head, 0, mask=there)
        before += tl.sum(tiles * num_heads, 0)
    tl.store(work + 2 + pieces, owners, mask=pieces < num_programs)


@triton.jit
def _own_tiles(left, seq, length, num_queries, window, PAGE: tl.constexpr, TILE: tl.constexpr):
    """(a sequence's first tile here, how many, how many another kernel has attended before)."""
    first, tiles = extent(length, num_queries, window, TILE)
    ahead = tiles * 0
    if left is not None:
        ahead = tiles_in_common(tl.load(left.num_pages + seq), length, PAGE, TILE)
    return first + ahead, tiles - ahead, ahead


@triton.jit
def _turned(
    x, k, v, weight, cos, sin, eps, slot, is_last, rows, head, position, k_stride, v_stride, x_head_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K_DIM: tl.constexpr, K_STORED: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, V_DIM: tl.constexpr, V_STORED: tl.constexpr,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Both parts of a position's queries, turned; x is its row of heads.

    Its key is turned with them, as row GROUP. The program of the head's last tile stores it, and its value.
    """
    is_key, turns = rows == GROUP, position.to(tl.int64) * HALF
    heads = tl.where(is_key, HEADS + head, head * GROUP + rows)
    one = tl.zeros([1], tl.int32)
    value = x + (HEADS + HEADS // GROUP + head + one) * x_head_stride
    v0 = fresh_columns(value, one == 0, 0, V0, V_DIM)
    v1 = v0
    if V1 > 0:
        v1 = fresh_columns(value, one == 0, V0, V1, V_DIM)
    q0, q1 = turned_parts(
        x + heads * x_head_stride, rows <= GROUP, weight if weight is None else weight + heads * K_DIM,
        cos + turns, sin + turns, eps, K0, K1, K_DIM, HALF, INTERLEAVED,
    )  # fmt: skip
    q0, q1 = q0.to(x.dtype.element_ty), q1.to(x.dtype.element_ty)
    store, page, row = is_last & (slot >= 0), slot // PAGE, head * PAGE + slot % PAGE
    store_rows(k + page * k_stride + row * K_STORED + rows * 0, is_key & store, q0, q1, K0, K1, K_DIM)
    store_rows(v + page * v_stride + row * V_STORED + one, (one == 0) & store, v0, v1, V0, V1, V_DIM)
    tl.debug_barrier()  # all threads of this program are going to read them
    return q0, q1


@triton.jit
def _attend_tiles(
    q0, q1, k, v, table, pages, sinks, left, ahead, seq, num_seqs, rows, keep, heads, head, length, num_queries,
    first, stop, is_first, scale, cap, window, k_stride, v_stride,
    HEADS: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K_DIM: tl.constexpr, K_STORED: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, V_DIM: tl.constexpr, V_STORED: tl.constexpr,
    V_IS_K0: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """The state of a sequence's rows over tiles first .. stop, and where these are its first over all before.

    `pages` are those of the first tile.
    """
    acc0, acc1, m, total = start_state(sinks, heads, keep & is_first, ROWS, V0, V1)
    if left is not None:
        acc0, acc1, m, total = add_left(
            acc0, acc1, m, total, left, tl.where(is_first, ahead, 0), seq, num_seqs, heads, keep,
            HEADS, SPLITS, V0, V1,
        )  # fmt: skip
    positions = length - num_queries + rows // GROUP
    last = (length - 1) // PAGE
    for tile in tl.range(first, stop, num_stages=STAGES):
        tokens = tile * TILE + tl.arange(0, TILE)
        # Past it, and before windows, lies whatever was left there, not a number perhaps; it need not be read.
        cached = tokens < length
        if WINDOWED:
            cached = cached & (tokens > length - num_queries - window)
        at = token_pointers(k, pages, tile, k_stride, head, K_STORED, PAGE, TILE)
        k0, k1 = two_parts(at, cached, K0, K1, K_DIM)
        if V_IS_K0:
            v0, v1 = k0, k0
        else:
            at = token_pointers(v, pages, tile, v_stride, head, V_STORED, PAGE, TILE)
            v0, v1 = two_parts(at, cached, V0, V1, V_DIM)
        pages = page_ids(table, tile + 1, last, PAGE, TILE)  # a tile ahead, or every tile would wait twice
        s, factor = scores_of(q0, q1, k0, k1, scale, cap, K1, CAPPED, PRECISION)
        seen = tokens[None, :] <= positions[:, None]
        if WINDOWED:
            seen = seen & (tokens[None, :] > positions[:, None] - window)
        s = tl.where(seen, s, -float("inf"))
        acc0, acc1, m, total = accumulate(acc0, acc1, m, total, s, factor, v0, v1, V1, PRECISION)
    return acc0, acc1, m, total


@triton.jit
def _weighted(partials, slots, keep, weights, COUNT: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
              SIZE: tl.constexpr):  # fmt: skip
    """The sum over slots [N] of weights [N, COUNT] times their rows' columns FIRST .. -> [COUNT, WIDTH]."""
    rows = slots[:, None] * COUNT + tl.arange(0, COUNT)[None, :]
    at = partials + rows[:, :, None] * SIZE + (FIRST + tl.arange(0, WIDTH))[None, None, :]
    # Past the first-level cache, which may hold what another program has overwritten since.
    values = tl.load(at, mask=keep[:, None, None], other=0.0, cache_modifier=".cg")
    return tl.sum(values * weights[:, :, None], 0)


@triton.jit
def _merge(
    partials, sums, first, num, begin, share,
    COUNT: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """What programs first .. first + num left of the pair whose tiles start at `begin`, added up in order."""
    acc0, acc1, m, total = start_state(None, 0, False, COUNT, V0, V1)
    rows = tl.arange(0, COUNT)
    for i in range(0, num, AT_ONCE):
        programs = first + i + tl.arange(0, AT_ONCE)
        keep = i + tl.arange(0, AT_ONCE) < num
        slots = programs * 2 + (programs * share < begin).to(tl.int32)
        at = sums + slots[:, None] * (2 * COUNT) + rows[None, :]
        their_m = tl.load(at, mask=keep[:, None], other=FLOOR, cache_modifier=".cg")
        their_total = tl.load(at + COUNT, mask=keep[:, None], other=0.0, cache_modifier=".cg")
        new = tl.maximum(m, tl.max(their_m, 0))
        weights, fade = tl.exp2(their_m - new[None, :]), tl.exp2(m - new)
        total = total * fade + tl.sum(weights * their_total, 0)
        acc0 = acc0 * fade[:, None] + _weighted(partials, slots, keep, weights, COUNT, 0, V0, V0 + V1)
        if V1 > 0:
            acc1 = acc1 * fade[:, None] + _weighted(partials, slots, keep, weights, COUNT, V0, V1, V0 + V1)
        m = new
    return acc0, acc1, m, total


@triton.jit
def _finish(
    out, weighs, partials, sums, arrivals, acc0, acc1, m, total, first_row, group, num_rows, t, begin, end, stop, share,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, V_DIM: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Store the result of the pair whose tiles are begin .. end, of which this program did t .. stop."""
    program = tl.program_id(0)
    head, part = group // GROUPS, group % GROUPS
    rows = part * ROWS + tl.arange(0, ROWS)
    at = (first_row + rows // GROUP).to(tl.int64) * HEADS + head * GROUP + rows % GROUP
    if (t == begin) & (stop == end):
        keep = rows < num_rows
        store_rows(out + at * V_DIM, keep, acc0 / total[:, None], acc1 / total[:, None], V0, V1, V_DIM)
        if weighs is not None:
            tl.store(weighs + at, logarithm(m, total), mask=keep)
    else:
        slot = program * 2 + (program * share < begin).to(tl.int32)
        local = tl.arange(0, ROWS)
        keep = local < COUNT
        store_rows(partials + (slot * COUNT + local) * (V0 + V1), keep, acc0, acc1, V0, V1, V0 + V1)
        tl.store(sums + slot * (2 * COUNT) + local, m, mask=keep)
        tl.store(sums + slot * (2 * COUNT) + COUNT + local, total, mask=keep)
        tl.debug_barrier()  # one thread counts this program in, after the stores of all its threads
        first = begin // share
        num = (end - 1) // share - first + 1
        if tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == num - 1:
            tl.store(arrivals, 0)  # for the next layer
            sum0, sum1, most, weight = _merge(
                partials, sums, first, num, begin, share, COUNT, V0, V1, AT_ONCE
            )
            used = part * ROWS + tl.arange(0, COUNT)
            places = (first_row + used // GROUP).to(tl.int64) * HEADS + head * GROUP + used % GROUP
            sum0, sum1 = sum0 / weight[:, None], sum1 / weight[:, None]
            store_rows(out + places * V_DIM, used < num_rows, sum0, sum1, V0, V1, V_DIM)
            if weighs is not None:
                tl.store(weighs + places, logarithm(most, weight), mask=used < num_rows)


@triton.jit(do_not_specialize=["num_seqs", "num_rows", "most", "window", "table_stride"])
def decode(
    q, k, v, tables, lengths, starts, slots, positions, work, partials, left, most, weight, cos, sin, eps, out, weighs,
    sinks, scale, cap, window, num_seqs, num_rows, q_stride, q_head_stride, table_stride, k_stride, v_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr,
    SPLITS: tl.constexpr, AT_ONCE: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, K_DIM: tl.constexpr, K_STORED: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, V_DIM: tl.constexpr, V_STORED: tl.constexpr,
    V_IS_K0: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    WINDOWED: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    """out [T, HEADS, V_DIM] of q [T, HEADS, K_DIM]: one program's piece of the line.

    A key head's rows are cut into GROUPS of ROWS, of which COUNT are used; sequences of more than `most` queries are
    another kernel's. Where HALF is not 0, queries still have to be turned, by `positions` (lengths do not tell those of
    a chunk), and a token's key and value lie behind them. `weighs` [T, HEADS] or None: for log sums of exponentials.
    """
    follow(NEXT)
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    zero_padding(out, starts, num_seqs, num_rows, HEADS * V_DIM)
    share, all_tiles, seq = tl.load(work), tl.load(work + 1), tl.load(work + 2 + program)
    num_heads: tl.constexpr = HEADS // GROUP * GROUPS
    begins, sums = work + 2 + num_programs, partials + num_programs * (2 * COUNT * (V0 + V1))
    t, last = program * share, tl.minimum(program * share + share, all_tiles)
    while t < last:
        first_row, length, before = tl.load(starts + seq), tl.load(lengths + seq), tl.load(begins + seq)
        num_queries = tl.load(starts + seq + 1) - first_row
        first_tile, tiles, ahead = _own_tiles(left, seq, length, num_queries, window, PAGE, TILE)
        if (tiles == 0) | (num_queries > most):
            seq += 1
        else:
            group = (t - before) // tiles
            begin, end = before + group * tiles, before + (group + 1) * tiles
            stop, rows = tl.minimum(end, last), group % GROUPS * ROWS + tl.arange(0, ROWS)
            keep, heads = rows < num_queries * GROUP, group // GROUPS * GROUP + rows % GROUP
            table, first = tables + seq.to(tl.int64) * table_stride, first_tile + t - begin
            pages = page_ids(table, first, (length - 1) // PAGE, PAGE, TILE)
            x = q + first_row.to(tl.int64) * q_stride
            if HALF == 0:
                q0, q1 = two_parts(x + rows // GROUP * q_stride + heads * q_head_stride, keep, K0, K1, K_DIM)
            else:
                q0, q1 = _turned(
                    x, k, v, weight, cos, sin, eps, tl.load(slots + first_row), stop == end, rows, group,
                    tl.load(positions + first_row), k_stride, v_stride, q_head_stride, HEADS, GROUP, PAGE,
                    K0, K1, K_DIM, K_STORED, V0, V1, V_DIM, V_STORED, HALF, INTERLEAVED,
                )  # fmt: skip
            acc0, acc1, m, total = _attend_tiles(
                q0, q1, k, v, table, pages, sinks, left, ahead, seq, num_seqs, rows, keep, heads, group // GROUPS,
                length, num_queries, first, first_tile + stop - begin, t == begin, scale, cap, window,
                k_stride, v_stride, HEADS, SPLITS, GROUP, ROWS, PAGE, TILE, STAGES, K0, K1, K_DIM, K_STORED,
                V0, V1, V_DIM, V_STORED, V_IS_K0, CAPPED, PRECISION, WINDOWED,
            )  # fmt: skip
            _finish(
                out, weighs, partials, sums, begins + num_seqs + seq * num_heads + group, acc0, acc1, m, total,
                first_row, group, num_queries * GROUP, t, begin, end, stop, share,
                GROUP, ROWS, COUNT, HEADS, GROUPS, V0, V1, V_DIM, AT_ONCE,
            )  # fmt: skip
            t = stop
            seq += (stop == before + num_heads * tiles).to(tl.int32)
    if NEXT == LATE:
        gdc_launch_dependents()
