"""Rules on a GPU: one kernel, in which a program does what a row's record says about its chunk of the tokens."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from quire.sampling.rules import ANY, Header

CHUNK = 4096  # tokens of a program
SOME = 256  # entries of a record that are looked at together


def restrict(logits: Tensor, slots: Tensor, positions: Tensor, tokens: Tensor, addresses: Tensor) -> None:
    """Do what `quire.sampling.rules.restrict` does; `logits` has no gaps between tokens."""
    num_rows, vocab_size = logits.shape
    if num_rows:
        grid = (triton.cdiv(vocab_size, CHUNK), num_rows)
        given = (logits, logits.stride(0), vocab_size, slots, positions, tokens, tokens.stride(0), addresses)
        _restrict[grid](*given, len(Header._fields), ANY, CHUNK, SOME)


@triton.jit
def _restrict(
    logits, row_stride, vocab_size, slots, positions, tokens, tokens_stride, addresses,
    header: tl.constexpr, any_token: tl.constexpr, size: tl.constexpr, some: tl.constexpr,
):  # fmt: skip
    """One chunk of a row; most rows have no rules. Grid (C, R)."""
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row)
    address = tl.load(addresses + slot)
    if address != 0:
        record = address.to(tl.pointer_type(tl.int32))
        late_from, first_output = tl.load(record), tl.load(record + 1)  # as in `Header`
        num_mask_words, num_added = tl.load(record + 2), tl.load(record + 3)
        num_phrases, width = tl.load(record + 4), tl.load(record + 5)
        position = tl.load(positions + row)
        logits += row * row_stride
        first = tl.program_id(0) * size
        end = tl.minimum(first + size, vocab_size)
        record += header
        if num_mask_words > 0:
            keep_allowed(logits, record, first, end, size)
            tl.debug_barrier()  # the same tokens are read by other threads below
        record += num_mask_words
        if num_added > 0:
            late = position >= late_from
            add(
                logits, record, record + num_added + tl.where(late, num_added, 0), num_added, first, end, some
            )
            tl.debug_barrier()
        record += 3 * num_added
        if num_phrases > 0:
            newest = tokens + slot * tokens_stride + position - 1
            num_outputs = position - first_output
            ban(logits, record, newest, num_outputs, num_phrases, width, first, end, any_token, some)


@triton.jit
def keep_allowed(logits, words, first, end, size: tl.constexpr):
    """-inf for what is not allowed; NaN and infinity stay, as somebody must say that the row is bad."""
    tokens = first + tl.arange(0, size)
    inside = tokens < end
    allowed = (tl.load(words + tokens // 32, mask=inside, other=0) >> (tokens % 32)) & 1
    x = tl.load(logits + tokens, mask=inside, other=0.0)
    tl.store(
        logits + tokens, tl.zeros_like(x) - float("inf"), mask=inside & (allowed == 0) & (x < float("inf"))
    )


@triton.jit
def add(logits, tokens, values, count, first, end, some: tl.constexpr):
    """Adds `values`, whose bits are in int32, to the logits of `tokens` [count]; none is twice among them."""
    values = values.to(tl.pointer_type(tl.float32))
    for start in range(0, count, some):
        at = start + tl.arange(0, some)
        token = tl.load(tokens + at, mask=at < count, other=-1)
        mine = (token >= first) & (token < end)
        value = tl.load(values + at, mask=mine, other=0.0)
        x = tl.load(logits + token, mask=mine, other=0.0)
        tl.store(logits + token, x + value, mask=mine)


@triton.jit
def ban(
    logits, lasts, newest, num_outputs, count, width, first, end, any_token: tl.constexpr, some: tl.constexpr
):
    """-inf for the last tokens of the phrases whose other tokens are the newest ones."""
    prefixes = lasts + count
    for start in range(0, count, some):
        at = start + tl.arange(0, some)
        token = tl.load(lasts + at, mask=at < count, other=-1)
        hit = (token >= first) & (token < end)
        for back in range(width):
            wanted = tl.load(prefixes + at * width + (width - 1 - back), mask=hit, other=0)
            is_output = back < num_outputs
            found = tl.load(newest - back, mask=is_output, other=any_token)
            hit &= (wanted == any_token) | (is_output & (wanted == found))
        x = tl.load(logits + token, mask=hit, other=0.0)
        tl.store(logits + token, x - float("inf"), mask=hit)  # twice the same where two phrases end alike
