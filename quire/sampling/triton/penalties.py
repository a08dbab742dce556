"""Penalties on a GPU: one pass over the logits and counts of the rows that have any, and the counting."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

CHUNK = 2048  # tokens of a program


def penalise(logits: Tensor, rows: Tensor, seen: Tensor, strengths: Tensor, of: Tensor) -> None:
    """Do what `quire.sampling.penalties.penalise` does; `logits` has no gaps between tokens."""
    vocab_size = logits.shape[1]
    if len(rows):
        grid = (triton.cdiv(vocab_size, CHUNK), len(rows))
        _penalise[grid](logits, logits.stride(0), vocab_size, rows, seen, strengths, of, CHUNK)


def count(seen: Tensor, rows: Tensor, of: Tensor, token_ids: Tensor) -> None:
    """Do what `quire.sampling.penalties.count` does."""
    if len(rows):
        _count[(len(rows),)](seen, seen.shape[1], rows, of, token_ids)


@triton.jit
def _penalise(logits, row_stride, vocab_size, rows, seen, strengths, of, size: tl.constexpr):
    """One chunk of a row. Grid (C, R)."""
    row, place = tl.load(rows + tl.program_id(1)), tl.load(of + tl.program_id(1))
    tokens = tl.program_id(0) * size + tl.arange(0, size)
    inside = tokens < vocab_size
    marks = tl.load(seen + place * vocab_size + tokens, mask=inside, other=0)
    inside &= marks > 0  # most tokens were never seen; their logits are not even read
    logits += row * row_stride + tokens
    x = tl.load(logits, mask=inside, other=0.0)
    strengths += place * 3
    repetition, frequency, presence = tl.load(strengths), tl.load(strengths + 1), tl.load(strengths + 2)
    times = marks >> 1
    penalty = frequency * times.to(tl.float32) + tl.where(times > 0, presence, 0.0)
    repeated = tl.where(x > 0, tl.div_rn(x, repetition + tl.zeros_like(x)), x * repetition)
    tl.store(logits, repeated - penalty, mask=inside)


@triton.jit
def _count(seen, vocab_size, rows, of, token_ids):
    """One row; no two rows share their counts. Grid (R)."""
    row = tl.program_id(0)
    token = tl.load(token_ids + tl.load(rows + row))
    place = seen + tl.load(of + row) * vocab_size + token
    tl.store(place, tl.load(place) + 2)
