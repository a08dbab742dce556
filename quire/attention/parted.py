"""Attention over a cache of which each of several ranks has every size-th position of a sequence. Knows no layers.

Position p is the p // size-th of rank p % size, so that all have as much whatever the length; a block holds the
positions that all ranks' blocks of its number hold together. For a chunk of a sequence, the rows of one residue see one
more position of any rank from each to the next: kernels take them for a sequence of their own, and know nothing.

    positions of a chunk    5 6 7 8 9 10        of 2 ranks: 6 8 10 | 5 7 9
    rank 0 has 0 2 4 6 8 10; they see                       4 5  6 | 3 4 5   of these

Ranks that share a key head are each asked for what its part holds for the queries of all of them, and how much that
weighs; each then adds up what the parts have for its own queries. Ranks along the axis have the same key heads.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quire.attention import sparse
from quire.attention.base import (
    Backend,
    Divisible,
    LayerCache,
    Product,
    Ragged,
    Turn,
    turn_and_write,
)
from quire.attention.shapes import CacheShape
from quire.attention.sparse import Chosen, sequences_of
from quire.errors import ConfigError
from quire.parallel.axis import Axis


class Parted:
    """A backend of which each rank of an axis has a part of the cache; steps are what `part_of` makes of them."""

    shares = False

    def __init__(self, backend: Divisible, axis: Axis):
        self.backend, self.axis = backend, axis
        self.name, self.block_size, self.quantized = backend.name, backend.block_size, backend.quantized
        self.capturable, self.invariant = backend.capturable, backend.invariant

    def why_not(self, dtype: torch.dtype, device: torch.device) -> str | None:
        return self.backend.why_not(dtype, device)

    def views(self, pool: Tensor, offset: int, shape: CacheShape, dtype: torch.dtype) -> LayerCache:
        return self.backend.views(pool, offset, shape, dtype)

    def write(self, cache: LayerCache, k: Tensor, v: Tensor | None, step: Ragged) -> None:
        self.backend.write(cache, k, v, step)

    def attend_turned(self, heads: Tensor, cache: LayerCache, turn: Turn, step: Ragged, **how: Any) -> Tensor:
        return self.attend(turn_and_write(self, cache, heads, turn, step), cache, step, **how)

    def attend_product(
        self, product: Product, cache: LayerCache, turn: Turn, step: Ragged, **how: Any
    ) -> Tensor:
        return self.attend_turned(product.heads(), cache, turn, step, **how)

    def attend(
        self,
        q: Tensor,
        cache: LayerCache,
        step: Ragged,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        tokens, heads, size = *q.shape[:2], self.axis.size
        how: Any = {"scale": scale, "window": self._own_window(window, step), "softcap": softcap}
        every = self.axis.all_gather(q, 1)
        if step.order is not None:
            every = every[step.order]
        found, sums = self.backend.attend_part(every, cache, step, **how)
        parts = torch.cat((found, sums[..., None]), -1)  # [T, size * H, Dv + 1]
        if step.order is not None:
            parts = torch.empty_like(parts).index_copy_(0, step.order, parts)
        rows = parts.unflatten(1, (size, heads)).transpose(0, 1).flatten(0, 1)
        each = [tokens] * size
        mine = self.axis.all_to_all(rows, each, each).unflatten(0, (size, tokens))
        return merge(mine[..., :-1], mine[..., -1], sinks).to(q.dtype)

    def _own_window(self, window: int | None, step: Ragged) -> int | None:
        """Of as many positions of this rank's as of any other's, unless it hides none."""
        size = self.axis.size
        if window is not None and window % size and window <= size * (step.max_length - 1):
            raise ValueError(f"a window of {window} positions is not the same number of each of {size} ranks")
        return window and -(-window // size)

    def read(self, cache: LayerCache, slots: Tensor) -> Tensor:
        return self.backend.read(cache, slots)

    def score(self, q: Tensor, weights: Tensor, cache: LayerCache, step: Ragged, rows: slice) -> Tensor:
        return self.backend.score(q, weights, cache, _row_by_row(step, self.axis), rows)


def parted(backend: Backend, axis: Axis) -> Backend:
    """The backend over a cache that the axis's ranks have in parts.

    Raises:
        ConfigError: it does not say how much a part weighs.
    """
    if axis.size == 1:
        return backend
    if not isinstance(backend, Divisible):
        raise ConfigError(f"attention backend {backend.name} {NOT_DIVISIBLE}")
    return Parted(backend, axis)


NOT_DIVISIBLE = "does not say how much a part of a cache weighs, which decode_context_parallel_size needs"


def merge(found: Tensor, sums: Tensor, sinks: Tensor | None = None) -> Tensor:
    """What parts found [parts, T, H, D], weighed by their sums of exponentials -> [T, H, D], 0 if there is nothing.

    `sums` [parts, T, H] are logarithms, as are `sinks` [H], which weigh and have found nothing.
    """
    most = sums.amax(0)
    if sinks is not None:
        most = torch.maximum(most, sinks)
    most = most.clamp(min=torch.finfo(torch.float32).min)
    weights = (sums - most).exp()
    total = weights.sum(0) if sinks is None else weights.sum(0) + (sinks - most).exp()
    weighted = torch.where(weights[..., None] == 0, 0, found * weights[..., None])
    return weighted.sum(0) / total.clamp(min=torch.finfo(torch.float32).tiny)[..., None]


def choose(
    backend: Backend, q: Tensor, weights: Tensor, cache: LayerCache, step: Ragged, count: int
) -> Chosen:
    """`sparse.choose` among all ranks' positions, of which each gets those that it has."""
    if not isinstance(backend, Parted):
        return sparse.choose(backend, q, weights, cache, step, count)
    axis, size, of = backend.axis, backend.block_size, sequences_of(step)
    width = -(-step.max_length // axis.size)
    few, device = min(count, width), q.device
    slots = torch.empty(len(q), few, dtype=torch.int32, device=device)
    lengths = torch.empty(len(q), dtype=torch.int32, device=device)
    row_bytes = sparse.SCORE_BYTES * (width + axis.size * few) + 8 * q.shape[1] * sparse.SPAN
    for rows in sparse.pieces(len(q), row_bytes):
        scores = backend.score(q, weights, cache, step, rows)
        at = sparse.best(scores, few)
        at, lengths[rows] = _agreed(axis, scores.gather(1, at), at, step.positions[rows, None], count)
        slots[rows] = step.block_tables[of[rows, None], at // size] * size + at % size
    return Chosen(slots, lengths)


def _agreed(axis: Axis, scores: Tensor, at: Tensor, positions: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which of each rank's best `at` [n, few], of these scores, are among the best of all.

    Those of this rank first, in order, and their number [n]. None is after its row's of positions [n, 1].
    """
    own = torch.stack((scores.view(torch.int32), (at * axis.size + axis.rank).int()))
    theirs, places = axis.all_gather(own, 2)
    places, order = places.sort(1)
    columns = sparse.best(theirs.gather(1, order).view(torch.float32), min(count, places.shape[1]))
    places = places.gather(1, columns)
    mine = (places % axis.size == axis.rank) & (places <= positions)
    order = mine.byte().argsort(dim=1, descending=True, stable=True)[:, : at.shape[1]]
    return places.gather(1, order) // axis.size, mine.sum(1, dtype=torch.int32)


def _row_by_row(step: Ragged, axis: Axis) -> Ragged:
    """The step over this rank's part with its rows in order, each at the last position of the part that it sees."""
    return replace(
        step,
        positions=_below(step.positions + 1, axis.size, axis.rank) - 1,
        lengths=_below(step.lengths, axis.size, axis.rank),
        max_length=-(-step.max_length // axis.size),
    )


def part_of(step: Ragged, size: int, rank: int) -> Ragged:
    """The step over the positions that rank `rank` of `size` has of each sequence."""
    slots, longest = step.slot_mapping, -(-step.max_length // size)
    slots = torch.where((slots >= 0) & (slots % size == rank), slots // size, -1)
    if step.max_query <= 1:
        lengths = _below(step.lengths, size, rank)
        return replace(step, slot_mapping=slots, lengths=lengths, max_length=longest, shared=None)
    starts, ends = step.query_starts, step.lengths[:, None]
    begins = ends - starts.diff()[:, None]
    residues = torch.arange(size, dtype=torch.int32, device=starts.device)
    first, last = _below(begins, size, residues), _below(ends, size, residues)  # [S, size]
    counts = last - first
    lengths = torch.where(counts > 0, last - (residues < rank).int(), 0)
    query_starts = torch.nn.functional.pad(counts.flatten().cumsum(0, dtype=torch.int32), (1, 0))
    rows = torch.arange(len(slots), dtype=torch.int32, device=starts.device)
    owner = torch.searchsorted(query_starts[1:], rows, right=True).clamp(max=counts.numel() - 1)
    offsets = starts[:-1, None] - begins + residues + (first - query_starts[:-1].view_as(first)) * size
    order = torch.where(rows < query_starts[-1], offsets.flatten()[owner] + rows * size, rows)
    return replace(
        step,
        slot_mapping=slots,
        query_starts=query_starts,
        lengths=lengths.flatten(),
        block_tables=step.block_tables.repeat_interleave(size, 0),
        max_query=-(-step.max_query // size),
        max_length=longest,
        mixed=True,
        shared=None,
        order=order.long(),
    )


def _below(lengths: Tensor, size: int, residue: Tensor | int) -> Tensor:
    """How many of positions 0 .. length - 1 leave that residue."""
    return (lengths + (size - 1 - residue)) // size
