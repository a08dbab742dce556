# mypy: disable-error-code="no-untyped-def"
"""Scores of a sequence's positions by which an indexer chooses among them. A row is one program's, in one way."""

import triton
import triton.language as tl

from quire.attention.triton.tiles import columns_of, page_ids, token_pointers

TILE = 64  # tokens
TILES = 8  # of a program, which loads its queries once


@triton.jit(do_not_specialize=["width"])
def score(
    q, weights, pool, tables, sequences, positions, out, width, q_stride, q_head_stride, weights_stride, table_stride,
    stride, HEADS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, STORED: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [N, width] float32 = sum over HEADS of weights [N, HEADS] * relu(q [N, HEADS, DIM] . k), -inf past positions.

    Row n's k are those of sequence sequences[n]. ROWS and COLUMNS: powers of two that hold HEADS and DIM.
    """
    row = tl.program_id(0).to(tl.int64)
    heads, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mask = (heads < HEADS)[:, None] & (columns < DIM)[None, :]
    rows = q + row * q_stride + heads * q_head_stride
    queries = tl.load(rows[:, None] + columns[None, :], mask=mask, other=0.0)
    weight = tl.load(weights + row * weights_stride + heads, mask=heads < HEADS, other=0.0)
    table, length = (
        tables + tl.load(sequences + row) * table_stride,
        tl.load(positions + row).to(tl.int32) + 1,
    )
    first = tl.program_id(1) * TILES
    for tile in range(first, tl.minimum(first + TILES, (width + TILE - 1) // TILE)):
        at = tile * TILE + tl.arange(0, TILE)
        found = tl.full((TILE,), float("-inf"), tl.float32)
        if tile * TILE < length:
            pages = page_ids(table, tile, (length - 1) // PAGE, PAGE, TILE)
            keys = token_pointers(pool, pages, tile, stride, 0, STORED, PAGE, TILE)
            keys = columns_of(keys, at < length, 0, COLUMNS, DIM)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            scores = tl.maximum(scores, 0.0, propagate_nan=tl.PropagateNan.ALL) * weight[:, None]
            found = tl.where(at < length, tl.sum(scores, 0), found)
        tl.store(out + row * width + at, found, mask=at < width)
