"""Begin and end of a step of newest tokens, a kernel each: it reads and writes what slots hold, by slot."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.runner.advance import ENDED, Inputs
from quire.runner.ring import Ring
from quire.sampling.slots import Stops

COLUMNS = 256  # of a block table that are copied at once
WORDS = 1024  # of a report that are copied at once


def gather(rows: Tensor, numbers: Tensor, tokens: Tensor, inputs: Inputs, block_size: int) -> None:
    """Do what `quire.runner.advance.gather` does."""
    num_rows = len(rows)
    _gather[(num_rows,)](
        *(rows, numbers, tokens, inputs, num_rows, len(numbers) - 1, block_size),
        *(numbers.stride(0), tokens.stride(0), inputs.tables.stride(0)),
        ROWS=triton.next_power_of_2(num_rows),
        COLUMNS=COLUMNS,
        num_warps=4,
    )


def advance(
    rows: Tensor,
    numbers: Tensor,
    tokens: Tensor,
    stops: Stops,
    following: Tensor,
    token_ids: Tensor,
    bad: Tensor,
    scores: Tensor | None,
    ring: Ring,
) -> None:
    """Do what `quire.runner.advance.advance` does."""
    num_rows = len(rows)
    _advance[(1,)](
        *(rows, numbers, tokens, stops.records.addresses, stops.start, following),
        *(token_ids, bad.view(torch.uint8), scores, ring.entries, ring.count),
        *(num_rows, len(numbers) - 1, 0 if scores is None else len(scores), len(ring.entries)),
        *(numbers.stride(0), tokens.stride(0), ring.entries.stride(0)),
        ENDED=ENDED,
        ROWS=triton.next_power_of_2(num_rows),
        WORDS=WORDS,
        num_warps=8,
    )


@triton.jit(do_not_specialize=["num_rows", "nobody", "numbers_stride", "tokens_stride", "tables_stride"])
def _gather(
    rows, numbers, tokens, inputs, num_rows, nobody, block_size, numbers_stride, tokens_stride, tables_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One row. Grid (B)."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(rows + row)
    present = slot < nobody
    mine = numbers + slot * numbers_stride
    num_tokens = tl.load(mine)
    length = tl.where(present, tl.abs(num_tokens), 0)
    position = tl.maximum(length - 1, 0)
    token = tl.load(tokens + slot * tokens_stride + position)
    block = tl.load(mine + 1 + position // block_size).to(tl.int64)
    place = tl.where(present & (num_tokens > 0), block * block_size + position % block_size, -1)
    others = tl.arange(0, ROWS)
    inside = (others < num_rows) & (others <= row)
    slots = tl.load(rows + others, mask=inside, other=0)
    num_present = tl.sum((inside & (slots < nobody)).to(tl.int32), 0)
    tl.store(inputs.token_ids + row, token.to(tl.int64))
    tl.store(inputs.positions + row, position.to(tl.int64))
    tl.store(inputs.following + row, position.to(tl.int64) + 1)
    tl.store(inputs.slot_mapping + row, place)
    tl.store(inputs.query_starts + row + 1, num_present)
    tl.store(inputs.lengths + row, length)
    num_blocks = (length + block_size - 1) // block_size
    for first in range(0, num_blocks, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        keep = columns < num_blocks
        blocks = tl.load(mine + 1 + columns, mask=keep, other=0)
        tl.store(inputs.tables + row * tables_stride + columns, blocks, mask=keep)


@triton.jit(do_not_specialize=[
    "num_rows", "nobody", "num_scores", "num_entries", "numbers_stride", "tokens_stride", "entries_stride"
])  # fmt: skip
def _advance(
    rows, numbers, tokens, stops, stops_start, following, token_ids, bad, scores, entries, count,
    num_rows, nobody, num_scores, num_entries, numbers_stride, tokens_stride, entries_stride,
    ENDED: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """All rows, so that nobody reads the count after it was raised. Grid (1)."""
    step = tl.load(count)
    entry = entries + (step % num_entries) * entries_stride
    row = tl.arange(0, ROWS)
    inside = row < num_rows
    slot = tl.load(rows + row, mask=inside, other=nobody)
    present = inside & (slot < nobody)
    alive = present & (tl.load(numbers + slot * numbers_stride, mask=present, other=0) > 0)
    at = tl.load(following + row, mask=inside, other=0)
    token = tl.load(token_ids + row, mask=inside, other=0).to(tl.int32)
    flag = tl.load(bad + row, mask=inside, other=0).to(tl.int32)
    may_end = alive & (at >= tl.load(stops_start + slot, mask=alive, other=0))
    address = tl.load(stops + slot, mask=may_end, other=0)
    ends = is_among(token, address)
    tl.store(tokens + slot * tokens_stride + at, token, mask=alive)
    tl.store(numbers + slot * numbers_stride, tl.where(ends, -at - 1, at + 1).to(tl.int32), mask=alive)
    tl.store(entry + row, tl.where(present & ~alive, ENDED, token), mask=inside)
    tl.store(entry + num_rows + row, flag, mask=inside)
    if scores is not None:
        for first in range(0, num_scores, WORDS):
            word = first + tl.arange(0, WORDS)
            values = tl.load(scores + word, mask=word < num_scores, other=0)
            tl.store(entry + 2 * num_rows + word, values, mask=word < num_scores)
    tl.debug_barrier()
    tl.store(count, step + 1)


@triton.jit
def is_among(token, address):
    """Whether each of `token` [B] is in the list at its `address` [B]: a length, and so many numbers; 0 for none."""
    record = address.to(tl.pointer_type(tl.int32))
    num = tl.load(record, mask=address != 0, other=0)
    found = num < 0
    for i in range(tl.max(num, 0)):
        found |= (i < num) & (tl.load(record + 1 + i, mask=i < num, other=0) == token)
    return found
