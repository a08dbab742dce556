"""Which layers share blocks of the cache, from a spec alone. Knows no tensors and no device.

A block holds some layers' keys and values of as many positions as it has room for. Where some layers see only near
positions (scheduler/near.py) and others all, a block has those of far layers, and blocks beside it those of near ones:

    block:          | layer 5: K, V | layer 11: K, V |      group 0
    beside it:      | layer 0: K, V | layer 1: K, V |       group 1
                    | layer 2: K, V | layer 3: K, V |       group 2

All blocks are of one size, so that what near layers give up anybody can take. Where that would waste too much, all
layers are one group, and nothing is given up.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from quire.attention.shapes import block_bytes, cache_shapes, layer_offsets, layers_read
from quire.errors import ConfigError
from quire.models.spec import MLA, Attention, Foreign, Heads, Spec, attention_of
from quire.scheduler.near import Near

MOST_WASTE = 0.25  # of what is used


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each layer's keys and values lie: `offsets` in bytes, in blocks of a group."""

    block_bytes: int
    groups: tuple[int, ...]
    offsets: tuple[int, ...]
    near: Near | None = None


def cache_layout(
    spec: Spec, block_size: int, itemsize: int, quantized: bool = False, max_length: int | None = None
) -> Layout:
    """For sequences of up to `max_length` positions; None: nothing is given up.

    Raises:
        ConfigError: chunks of positions begin within a block.
    """
    plain = Layout(
        block_bytes(spec, block_size, itemsize, quantized),
        (0,) * len(cache_shapes(spec)),
        layer_offsets(spec, block_size, itemsize, quantized),
    )
    seen = {} if max_length is None else _seen(spec, max_length)
    near = [layer for layer, sizes in seen.items() if sizes != (None, None)]
    if not near:
        return plain
    window, chunk = (max(seen[layer][i] or 0 for layer in near) or None for i in (0, 1))
    if chunk is not None and chunk % block_size:
        raise ConfigError(
            f"block_size is {block_size}; it must divide {chunk}, a chunk of positions of this network"
        )
    sizes = [shape.num_bytes(block_size, itemsize, quantized) for shape in cache_shapes(spec)]
    far = sum(size for layer, size in enumerate(sizes) if layer not in near)
    if not far:
        return Layout(
            plain.block_bytes, plain.groups, plain.offsets, Near(parts=0, window=window, chunk=chunk)
        )
    groups, offsets = _divided(sizes, near, most=max(far, *(sizes[layer] for layer in near)))
    most = max(offset + size for offset, size in zip(offsets, sizes, strict=True))
    if most * (1 + max(groups)) > (1 + MOST_WASTE) * plain.block_bytes and chunk is None:
        return plain
    return Layout(most, groups, offsets, Near(parts=max(groups), window=window, chunk=chunk))


def in_common(layouts: Sequence[Layout]) -> tuple[Layout, ...]:
    """Layouts of a network's stages, changed so that sequences give up the same in all of them.

    A stage may thereby keep what none of its layers sees.
    """
    nears = [layout.near for layout in layouts if layout.block_bytes]
    known = [near for near in nears if near is not None]
    if not known:
        return tuple(layouts)
    window, chunk, parts = None, None, max(near.parts for near in known)
    for near in known:
        window, chunk = _greater(window, near.window), _greater(chunk, near.chunk)
    if len(known) < len(nears) and not parts:  # some stages' layers see all, and others' near positions only
        if chunk is None:
            return tuple(replace(layout, near=None) for layout in layouts)
        parts = 1  # so that a block itself is kept, and no step crosses the end of a chunk
    return tuple(replace(layout, near=Near(parts=parts, window=window, chunk=chunk)) for layout in layouts)


def _divided(sizes: list[int], near: list[int], most: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Groups and offsets: far layers in group 0, near ones in order in as few groups of `most` bytes as that takes."""
    groups, offsets, group, ends = [], [], 1, {0: 0, 1: 0}
    for layer, size in enumerate(sizes):
        if layer in near and ends[group] + size > most:
            group += 1
            ends[group] = 0
        mine = group if layer in near else 0
        groups.append(mine)
        offsets.append(ends[mine])
        ends[mine] += size
    return tuple(groups), tuple(offsets)


def _seen(spec: Spec, max_length: int) -> dict[int, tuple[int | None, int | None]]:
    """By layer the window and the chunk that it and those that read its cache see; None for both if one sees all."""
    if isinstance(spec, Foreign) and spec.alone:  # what they read is for their modules to say
        return {}
    if isinstance(spec, Foreign):
        calls: list[Attention | MLA | Heads | None] = [*spec.attention, *[None] * len(spec.states)]
    else:
        calls = [attention_of(block.mixer) for block in spec.blocks]
    seen: dict[int, tuple[int | None, int | None]] = {}
    for call, layer in zip(calls, layers_read(spec), strict=True):
        window = None if call is None or isinstance(call, MLA) else call.window
        chunk = call.chunk if isinstance(call, Attention) else None
        sizes = tuple(size if size and size < max_length else None for size in (window, chunk))
        before = seen.get(layer, sizes)
        far = (None, None) in (sizes, before)
        seen[layer] = (None, None) if far else (_greater(before[0], sizes[0]), _greater(before[1], sizes[1]))
    return seen


def _greater(a: int | None, b: int | None) -> int | None:
    return max(a or 0, b or 0) or None
