"""Attention to some of a sequence's positions, chosen by scores. Knows no layers and no weights.

What is chosen of each position's sequence is copied side by side, in the order of positions, into pages of its own,
and attended to like any other cache. So a position that sees all that there is gets the bits that it would get anyway.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from quire.attention.base import Backend, LayerCache, Ragged
from quire.attention.shapes import CHOICE_BYTES

SCORE_BYTES = 32  # of a score, and of what is compared and counted to find the best
SPAN = 256  # positions, from a multiple of it on, whose scores are one product


class Chosen(NamedTuple):
    """Whom each of a step's positions sees: the first `lengths` of `slots`, in the order of positions."""

    slots: Tensor  # [T, count] int32
    lengths: Tensor  # [T] int32


def choose(
    backend: Backend, q: Tensor, weights: Tensor, cache: LayerCache, step: Ragged, count: int
) -> Chosen:
    """Up to `count` positions with the best `Backend.score`. Of equal scores, earlier positions are taken."""
    of, found = sequences_of(step), torch.empty(len(q), count, dtype=torch.int32, device=q.device)
    size, row_bytes = backend.block_size, SCORE_BYTES * step.max_length + 8 * q.shape[1] * SPAN
    for rows in pieces(len(q), row_bytes):
        at = best(backend.score(q, weights, cache, step, rows), count)
        found[rows] = step.block_tables[of[rows, None], at // size] * size + at % size
    return Chosen(found, (step.positions + 1).clamp(max=count).int())


def attend(backend: Backend, q: Tensor, cache: LayerCache, chosen: Chosen, *, scale: float) -> Tensor:
    """`Backend.attend` of q [T, H, Dk] to the chosen."""
    (slots, lengths), size, device = chosen, backend.block_size, q.device
    tokens, count = slots.shape
    blocks, block_bytes = -(-count // size), cache.shape.num_bytes(size, q.element_size())
    out = q.new_empty(*q.shape[:2], cache.shape.v_dim)
    for rows in pieces(tokens, 2 * blocks * block_bytes):
        num_rows = rows.stop - rows.start
        own = torch.empty(num_rows * blocks, block_bytes, dtype=torch.uint8, device=device)
        copies = backend.views(own, 0, cache.shape, q.dtype)
        starts = torch.arange(num_rows + 1, device=device)
        to = (starts[:-1, None] * (blocks * size) + torch.arange(count, device=device)).flatten()
        alone = Ragged(
            positions=lengths[rows].long() - 1,
            slot_mapping=to[:num_rows],
            query_starts=starts.int(),
            lengths=lengths[rows],
            block_tables=torch.arange(num_rows * blocks, dtype=torch.int32, device=device).view(
                num_rows, blocks
            ),
            rows=starts[:-1],
            max_query=1,
            max_length=count,
        )
        keys = backend.read(cache, slots[rows].flatten())
        backend.write(copies, keys, None, replace(alone, positions=to, slot_mapping=to))
        out[rows] = backend.attend(q[rows], copies, alone, scale=scale)
    return out


def best(scores: Tensor, count: int) -> Tensor:
    """Columns [n, count] int64 of the largest of scores [n, width], ascending; of equal ones, the first."""
    scores = scores.nan_to_num(
        nan=torch.inf, posinf=torch.inf, neginf=-torch.inf
    )  # a broken sequence stays broken
    (num_rows, width), device = scores.shape, scores.device
    least = scores.kthvalue(width - count + 1, dim=1, keepdim=True).values
    above, equal = scores > least, scores == least
    room = count - above.sum(1, keepdim=True)
    taken = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))
    places = torch.where(taken, taken.cumsum(1) - 1, count)
    columns = torch.arange(width, device=device).expand(num_rows, width)
    return torch.empty(num_rows, count + 1, dtype=torch.int64, device=device).scatter_(1, places, columns)[
        :, :count
    ]


def read_pages(cache: LayerCache, slots: Tensor, block_size: int) -> Tensor:
    """`Backend.read` where k is [num_blocks, Hkv, block_size, Dk or more]."""
    blocks, inside = slots.long() // block_size, slots.long() % block_size
    return cache.k[blocks, :, inside][..., : cache.shape.k_dim]


def sequences_of(step: Ragged) -> Tensor:
    """Which sequence each of the step's positions is of [T] int64."""
    at = torch.arange(len(step.positions), dtype=torch.int32, device=step.positions.device)
    return torch.searchsorted(step.query_starts[1:], at, right=True)


def pieces(num_rows: int, row_bytes: int) -> list[slice]:
    """Consecutive rows that together take about CHOICE_BYTES."""
    most = max(1, CHOICE_BYTES // row_bytes)
    return [slice(first, min(first + most, num_rows)) for first in range(0, num_rows, most)]


def score_spans(
    backend: Backend,
    multiply: Callable[[Tensor, Tensor], Tensor],
    q: Tensor,
    weights: Tensor,
    cache: LayerCache,
    step: Ragged,
    rows: slice,
) -> Tensor:
    """`Backend.score`, waiting for the device; `multiply` makes x [n, D] and keys [SPAN, D] scores [n, SPAN] float32.

    Spans are products of one size, so that a score is the same bits whatever is beside it, if a product's row is.
    """
    size, device = backend.block_size, q.device
    out = torch.full((rows.stop - rows.start, step.max_length), -torch.inf, device=device)
    starts = step.query_starts.tolist()
    for s in range(len(step.lengths)):
        a, b = max(starts[s], rows.start), min(starts[s + 1], rows.stop)
        end = int(step.positions[b - 1]) + 1 if a < b else 0  # of what the last of these rows sees
        for first in range(0, end, SPAN):
            at = torch.arange(first, first + SPAN, device=device)
            within = at.clamp(max=end - 1)
            keys = backend.read(cache, step.block_tables[s, within // size].long() * size + within % size)
            products = multiply(q[a:b].flatten(0, 1), keys.flatten(1)).unflatten(0, (b - a, -1))
            found = (products.relu_() * weights[a:b, :, None]).sum(1)
            found.masked_fill_(at > step.positions[a:b, None], -torch.inf)
            out[a - rows.start : b - rows.start, first : first + SPAN] = found[:, : step.max_length - first]
    return out
