"""Penalties on a GPU: one pass over the logits and counts of the rows that have any, and the counting."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from quire.sampling.penalties import HEADER

CHUNK = 2048  # tokens of a program


def penalise(logits: Tensor, slots: Tensor, addresses: Tensor) -> None:
    """Do what `quire.sampling.penalties.penalise` does; `logits` has no gaps between tokens."""
    num_rows, vocab_size = logits.shape
    if num_rows:
        grid = (triton.cdiv(vocab_size, CHUNK), num_rows)
        _penalise[grid](logits, logits.stride(0), vocab_size, slots, addresses, HEADER, CHUNK)


def count(slots: Tensor, token_ids: Tensor, addresses: Tensor, own: range) -> None:
    """Do what `quire.sampling.penalties.count` does."""
    if len(slots):
        _count[(len(slots),)](slots, token_ids, addresses, own.start, len(own), HEADER, num_warps=1)


@triton.jit
def _penalise(logits, row_stride, vocab_size, slots, addresses, header: tl.constexpr, size: tl.constexpr):
    """One chunk of a row; most rows have no penalties. Grid (C, R)."""
    row = tl.program_id(1).to(tl.int64)
    address = tl.load(addresses + tl.load(slots + row))
    if address != 0:
        seen = address.to(tl.pointer_type(tl.int32)) + header
        strengths = address.to(tl.pointer_type(tl.float32))
        tokens = tl.program_id(0) * size + tl.arange(0, size)
        inside = tokens < vocab_size
        marks = tl.load(seen + tokens, mask=inside, other=0)
        inside &= marks > 0  # most tokens were never seen; their logits are not even read
        places = logits + row * row_stride + tokens
        x = tl.load(places, mask=inside, other=0.0)
        repetition, frequency, presence = tl.load(strengths), tl.load(strengths + 1), tl.load(strengths + 2)
        times = marks >> 1
        penalty = frequency * times.to(tl.float32) + tl.where(times > 0, presence, 0.0)
        repeated = tl.where(x > 0, tl.div_rn(x, repetition + tl.zeros_like(x)), x * repetition)
        tl.store(places, repeated - penalty, mask=inside)


@triton.jit
def _count(slots, token_ids, addresses, first, count, header: tl.constexpr):
    """One row; no two rows share their counts. Grid (R)."""
    row = tl.program_id(0)
    address = tl.load(addresses + tl.load(slots + row))
    token = tl.load(token_ids + row) - first
    if (address != 0) & (token >= 0) & (token < count):
        place = address.to(tl.pointer_type(tl.int32)) + header + token
        tl.store(place, tl.load(place) + 2)
