"""A step as layers see it that do not see all positions: other blocks, those of a chunk only, or a rank's part.

Kernels know neither: they take tables of blocks, slots and lengths. A chunk is a sequence that begins where it does, of
which each sequence computes positions of one only.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from quire.attention.base import Cache, LayerCache, Ragged
from quire.attention.parted import part_of
from quire.kernels.cpu.calls import kernel
from quire.kernels.cpu.native import load
from quire.kernels.dispatch import op
from quire.parallel.axis import Axis

Place = tuple[int, int | None]  # a layer's group, and its chunk


def places(caches: Iterable[Cache], chunks: Iterable[int | None], cp: Axis) -> frozenset[Place]:
    """Those of a network's layers, of which steps have to be seen otherwise; all, if cp's ranks have a part each."""
    found = set()
    for cache, chunk in zip(caches, chunks, strict=True):
        keys = cache[0] if isinstance(cache, tuple) and cache and isinstance(cache[0], LayerCache) else cache
        if isinstance(keys, LayerCache):
            found.add((keys.group, chunk))
    return frozenset(found if cp.size > 1 else found - {(0, None)})


def seen_from(step: Ragged, places: Iterable[Place], block_size: int, cp: Axis) -> Ragged:
    """The step with its views for layers of these places; `block_size` is of a rank's part of a block."""
    views = {place: _view(step, *place, block_size * cp.size) for place in places}
    if cp.size > 1:
        views = {place: part_of(view, cp.size, cp.rank) for place, view in views.items()}
    return replace(step, views=views)


def _view(step: Ragged, group: int, chunk: int | None, block_size: int) -> Ragged:
    if not group and chunk is None:
        return step
    if chunk and step.until is not None:
        raise ValueError("layers see chunks of positions, and some of these see later ones")
    if group and step.beside is None:
        raise ValueError("layers keep blocks beside others, and the step does not say which")
    beside = step.beside[group - 1] if group and step.beside is not None else None
    tables, slots, lengths = elsewhere(
        step.block_tables, step.slot_mapping, step.lengths, beside, block_size, chunk or 0
    )
    seen = replace(step, block_tables=tables, slot_mapping=slots, lengths=lengths)
    return replace(seen, max_length=min(step.max_length, chunk), shared=None) if chunk else seen


@op
def elsewhere(
    tables: Tensor, slots: Tensor, lengths: Tensor, beside: Tensor | None, block_size: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """tables [S, W], slots [T] and lengths [S] (base.py) in the blocks `beside` those, and since a `chunk` began."""
    if beside is not None:
        tables, found = beside[tables.long()], beside[slots.clamp(min=0) // block_size].long()
        slots = torch.where(slots < 0, slots, found * block_size + slots % block_size)
    if chunk:
        begin = (lengths - 1).clamp(min=0) // chunk * chunk
        columns = torch.arange(tables.shape[1], device=tables.device) + (begin // block_size)[:, None]
        tables = tables.gather(1, columns.clamp(max=tables.shape[1] - 1))
        lengths = lengths - begin
    return tables, slots, lengths


@elsewhere.on("cpu", torch.int32)
def elsewhere_native(
    tables: Tensor, slots: Tensor, lengths: Tensor, beside: Tensor | None, block_size: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The compiled kernel, where there is one."""
    if load()[0] is None:
        found: tuple[Tensor, Tensor, Tensor] = elsewhere.reference(
            tables, slots, lengths, beside, block_size, chunk
        )
        return found
    new = torch.empty(tables.shape, dtype=torch.int32), torch.empty(slots.shape, dtype=torch.int64)
    ends = torch.empty(lengths.shape, dtype=torch.int32) if chunk else lengths
    kernel("quire_elsewhere")(
        *(tables.data_ptr(), slots.data_ptr(), lengths.data_ptr()),
        *(0 if beside is None else beside.data_ptr(), new[0].data_ptr(), new[1].data_ptr(), ends.data_ptr()),
        *(*tables.shape, tables.stride(0), len(slots), block_size, chunk),
    )
    return (*new, ends)
