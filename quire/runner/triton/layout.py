"""Begin of a step of several positions per sequence, in one kernel."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from quire.runner.layout import Layout

POSITIONS = 64  # that a program fills
SEQS = tl.constexpr(64)  # that it looks at, at once
COLUMNS = 256  # of a block table that are copied at once


def lay_out(sheet: Tensor, numbers: Tensor, tokens: Tensor, layout: Layout, block_size: int) -> None:
    """Do what `quire.runner.layout.lay_out` does."""
    num_tokens, num_seqs = len(layout.token_ids), len(layout.lengths)
    _lay_out[(num_seqs + triton.cdiv(num_tokens, POSITIONS),)](
        *(sheet, numbers, tokens, layout, num_tokens, num_seqs, block_size),
        *(sheet.stride(0), numbers.stride(0), tokens.stride(0), layout.tables.stride(0)),
        POSITIONS=POSITIONS,
        COLUMNS=COLUMNS,
        num_warps=4,
    )


@triton.jit(do_not_specialize=[
    "num_tokens", "num_seqs", "sheet_stride", "numbers_stride", "tokens_stride", "tables_stride"
])  # fmt: skip
def _lay_out(
    sheet, numbers, tokens, layout, num_tokens, num_seqs, block_size,
    sheet_stride, numbers_stride, tokens_stride, tables_stride,
    POSITIONS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A sequence, or some positions. Grid (S + T / POSITIONS)."""
    program = tl.program_id(0)
    if program < num_seqs:
        _sequence(
            sheet, numbers, layout, program, block_size, sheet_stride, numbers_stride, tables_stride, COLUMNS
        )
    else:
        _positions(
            sheet, numbers, tokens, layout, (program - num_seqs) * POSITIONS, num_tokens, num_seqs, block_size,
            sheet_stride, numbers_stride, tokens_stride, POSITIONS,
        )  # fmt: skip


@triton.jit
def _sequence(
    sheet, numbers, layout, seq, block_size, sheet_stride, numbers_stride, tables_stride,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    slot, begin = tl.load(sheet + seq), tl.load(sheet + sheet_stride + seq)
    starts = sheet + 2 * sheet_stride + seq
    start, stop = tl.load(starts), tl.load(starts + 1)
    length = tl.where(stop > start, begin + stop - start, 0)
    tl.store(layout.query_starts + seq + 1, stop.to(tl.int32))
    tl.store(layout.lengths + seq, length.to(tl.int32))
    tl.store(layout.following + seq, length)
    tl.store(layout.last_rows + seq, tl.maximum(stop - 1, 0))
    num_blocks = (length + block_size - 1) // block_size
    mine = numbers + slot * numbers_stride + 1
    table = layout.tables + seq.to(tl.int64) * tables_stride
    for first in range(0, num_blocks, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        keep = columns < num_blocks
        tl.store(table + columns, tl.load(mine + columns, mask=keep, other=0), mask=keep)


@triton.jit
def _positions(
    sheet, numbers, tokens, layout, first, num_tokens, num_seqs, block_size,
    sheet_stride, numbers_stride, tokens_stride, POSITIONS: tl.constexpr,
):  # fmt: skip
    rows = first + tl.arange(0, POSITIONS)
    starts = sheet + 2 * sheet_stride
    owner = tl.zeros([POSITIONS], tl.int32)
    for seq in range(0, num_seqs, SEQS):
        seqs = seq + tl.arange(0, SEQS)
        stops = tl.load(starts + 1 + seqs, mask=seqs < num_seqs, other=num_tokens)
        owner += tl.sum((stops[None, :] <= rows[:, None]).to(tl.int32), 1)
    present = rows < tl.load(starts + num_seqs)
    owner = tl.minimum(owner, num_seqs - 1)
    slot = tl.load(sheet + owner)
    begin = tl.load(sheet + sheet_stride + owner, mask=present, other=0)
    position = tl.where(present, begin + rows - tl.load(starts + owner), 0)
    block = tl.load(numbers + slot * numbers_stride + 1 + position // block_size, mask=present, other=0)
    place = tl.where(present, block.to(tl.int64) * block_size + position % block_size, -1)
    token = tl.load(tokens + slot * tokens_stride + position, mask=present, other=0)
    inside = rows < num_tokens
    tl.store(layout.token_ids + rows, token.to(tl.int64), mask=inside)
    tl.store(layout.positions + rows, position, mask=inside)
    tl.store(layout.slot_mapping + rows, place, mask=inside)
