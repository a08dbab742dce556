"""Log probabilities on a GPU: one pass over the logits, then the likeliest tokens from their groups' maxima."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.sampling.triton.parts import INF, Sizes, float_of, greatest, key_of, scalar

MOST = 64  # likeliest tokens; each costs about a microsecond, so many are better sorted
NOTHING = tl.constexpr(-(2**31))  # below the key of any float


class Seen(NamedTuple):
    """What a scan saw of each chunk, [R, C], and of its groups."""

    top: Tensor  # float32: the greatest logit
    mass: Tensor  # float32: sum of exp(logit - greatest)
    ahead: Tensor  # int32: how many logits exceed the chosen token's
    maxima: Tensor  # float32 [R, C * chunk / group]


def score(
    logits: Tensor, chosen: Tensor, k: int, sizes: Sizes | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What `quire.sampling.logprobs.score` returns, for k <= MOST; of equal tokens the first comes first."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    num_rows, vocab_size = logits.shape
    sizes = sizes or Sizes()
    num_chunks = triton.cdiv(vocab_size, sizes.chunk)
    sizes = sizes._replace(width=triton.next_power_of_2(num_chunks))
    ids = logits.new_empty(num_rows, 1 + k, dtype=torch.int64)
    values = logits.new_empty(num_rows, 1 + k)
    ranks = logits.new_empty(num_rows, dtype=torch.int32)
    if num_rows:
        top, mass = logits.new_empty(2, num_rows, num_chunks)
        maxima = logits.new_empty(num_rows, num_chunks * (sizes.chunk // sizes.group))
        seen = Seen(top, mass, torch.empty_like(top, dtype=torch.int32), maxima)
        given = (logits, logits.stride(0), vocab_size, chosen.contiguous(), seen)
        _scan[(num_chunks, num_rows)](*given, sizes, num_warps=8)
        _report[(num_rows,)](*given, (ids, values, ranks), k, sizes, num_warps=8)
    return ids, values, ranks


@triton.jit
def _scan(logits, row_stride, vocab_size, chosen, seen, sizes: tl.constexpr):
    """One chunk of a row. Grid (C, R)."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = row * tl.num_programs(0) + chunk
    logits += row * row_stride
    tokens = chunk * sizes.chunk + tl.arange(0, sizes.chunk)
    x = tl.load(logits + tokens, mask=tokens < vocab_size, other=-INF)
    num_groups: tl.constexpr = sizes.chunk // sizes.group
    maxima = tl.max(tl.reshape(x, [num_groups, sizes.group]), 1)
    top = tl.max(maxima, 0)
    base = tl.where(top > -INF, top, 0.0)
    ahead = x > tl.load(logits + tl.load(chosen + row))
    tl.store(seen.top + at, top)
    tl.store(seen.mass + at, tl.sum(tl.exp(x - base), 0))
    tl.store(seen.ahead + at, tl.sum(ahead.to(tl.int32), 0))
    tl.store(seen.maxima + at * num_groups + tl.arange(0, num_groups), maxima)


@triton.jit
def _report(logits, row_stride, vocab_size, chosen, seen, out, k, sizes: tl.constexpr):
    """Puts a row's chunks together. `out` is (ids, log probabilities, ranks). Grid (R)."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    num_chunks = (vocab_size + sizes.chunk - 1) // sizes.chunk
    chunks = tl.arange(0, sizes.width)
    inside, at = chunks < num_chunks, row * num_chunks + chunks
    tops = tl.load(seen.top + at, mask=inside, other=-INF)
    top = tl.max(tops, 0)
    mass = tl.load(seen.mass + at, mask=inside, other=0.0) * tl.exp(tops - top)
    log_sum = tl.log(tl.sum(mass.to(tl.float64), 0)).to(tl.float32)
    ranks = tl.sum(tl.load(seen.ahead + at, mask=inside, other=0), 0) + 1
    tl.store(out[2] + row, ranks)
    token = tl.load(chosen + row)
    ids, values = out[0] + row * (k + 1), out[1] + row * (k + 1)
    tl.store(ids, token)
    tl.store(values, tl.load(logits + token) - top - log_sum)
    groups = tl.arange(0, sizes.width * (sizes.chunk // sizes.group))
    num_groups = (vocab_size + sizes.group - 1) // sizes.group
    maxima = seen.maxima + row * num_chunks * (sizes.chunk // sizes.group)
    usable = groups < num_groups
    keys = tl.where(usable, key_of(tl.load(maxima + groups, mask=usable, other=0.0)), NOTHING)
    after = tl.full(
        groups.shape, -1, tl.int32
    )  # of a group's tokens that equal its key, those up to here are taken
    done = scalar(0)
    while done < k:
        key, group = greatest(keys)
        past = tl.max(tl.where(groups == group, after, -1), 0)
        members = tl.arange(0, sizes.group)
        tokens = group * sizes.group + members
        x = tl.load(logits + tokens, mask=tokens < vocab_size, other=0.0)
        left = tl.where(tokens < vocab_size, key_of(x), NOTHING)
        left = tl.where((left < key) | ((left == key) & (members > past)), left, NOTHING)
        _, first = greatest(left)
        done += 1
        tl.store(ids + done, (group * sizes.group + first).to(tl.int64))
        tl.store(values + done, float_of(key) - top - log_sum)
        left = tl.where(members == first, NOTHING, left)
        following = tl.max(left, 0)
        keys = tl.where(groups == group, following, keys)
        after = tl.where(groups == group, tl.where(following == key, first, -1), after)
