"""What attention over the paged cache needs to know about a step, and what a backend must do.

A backend owns the layout inside a layer's share of a block. It knows no layers and no weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from quire.attention.groups import Layout, cache_layout
from quire.attention.shapes import NOTHING, CacheShape, cache_shapes, layers_read
from quire.attention.states import State, layer_states
from quire.kernels import ops
from quire.models import spans as rules
from quire.models.spec import Spec
from quire.scheduler.spans import Spans, within


@dataclass(frozen=True, slots=True)
class Shared:
    """Which of a step's S sequences, of one position each, begin with the same pages; backends may read these once.

    A group of more members than M is several groups. Rows and pages past the last group's are 0 and -1.
    """

    members: Tensor  # [G, M] int32: sequences, then -1
    member_pages: Tensor  # [G] int32: how many whole pages they have in common
    num_pages: Tensor  # [S] int32: the same by sequence; 0 for those in no group

    def first(self, num_groups: int, num_seqs: int) -> "Shared":
        """The same memory for fewer."""
        return Shared(self.members[:num_groups], self.member_pages[:num_groups], self.num_pages[:num_seqs])


@dataclass(frozen=True, slots=True)
class Ragged:
    """A step's sequences laid end to end: T positions of S sequences, prefill chunks and decodes alike.

    Sequence s owns rows query_starts[s] .. query_starts[s + 1]; they are the last positions of its
    lengths[s] positions. Rows past query_starts[S] are padding: written nowhere, attended by nothing.
    """

    positions: Tensor  # [T] int64
    slot_mapping: Tensor  # [T] int64: block * block_size + offset, where the position's KV goes; -1: nowhere
    query_starts: Tensor  # [S + 1] int32
    lengths: Tensor  # [S] int32: positions with KV, this step's included
    block_tables: Tensor  # [S, max_blocks] int32
    rows: Tensor  # [S] int64: whose state is whose, where mixers keep any (states.py)
    max_query: int  # the longest chunk, on the host
    max_length: int  # the longest sequence, on the host
    mixed: bool = False  # there may be sequences of one position beside longer ones
    shared: Shared | None = None
    beside: Tensor | None = None  # [parts, num_blocks] int32: the blocks beside each block, if any; groups.py
    # [T], or [3, T] in time, height and width, int64: what rotation goes by instead of `positions`.
    coordinates: Tensor | None = None
    order: Tensor | None = (
        None  # [T] int64: the rows of the step that sequences own, if not their own; parted.py
    )
    # Where positions see later ones: where what each sees ends, and where the span begins that it is in, or itself.
    until: Tensor | None = None  # [T] int32
    since: Tensor | None = None  # [T] int32; None where it sees no more of those before it than its window
    wanted: Tensor | None = None  # [R] int64: the rows of the network's output that are read, if not all
    # The step as layers of a group see it, and of those that see chunks; views.py.
    views: Mapping[tuple[int, int | None], "Ragged"] = field(default_factory=dict)

    def seen_by(self, cache: "LayerCache", chunk: int | None, spans: rules.Spans | None = None) -> "Ragged":
        """The step for a layer whose keys and values are in `cache`, and which sees chunks or spans of positions."""
        step = self.views.get((cache.group, chunk), self)
        if step.until is None or (spans is not None and spans.wide):
            return step
        return replace(step, until=None if spans is None else step.until, since=None)


def ragged(
    starts: Sequence[int],
    counts: Sequence[int],
    tables: Sequence[Sequence[int]],
    block_size: int,
    device: torch.device | str = "cpu",
    spans: Sequence[Spans] | None = None,
) -> Ragged:
    """Lay out chunks: sequence i computes counts[i] positions from starts[i] on, in blocks tables[i] and row i.

    Positions of spans[i] see each other.
    """
    seen = None if spans is None else see_ahead(starts, counts, spans)
    until, since = (None, None) if seen is None else torch.from_numpy(seen).to(device)
    positions, slots, ends, width = [], [], [0], max(map(len, tables), default=1)
    for start, count, table in zip(starts, counts, tables, strict=True):
        for position in range(start, start + count):
            positions.append(position)
            slots.append(table[position // block_size] * block_size + position % block_size)
        ends.append(ends[-1] + count)
    lengths = [start + count for start, count in zip(starts, counts, strict=True)]
    padded = [[*table, *[0] * (width - len(table))] for table in tables]
    return Ragged(
        positions=torch.tensor(positions, dtype=torch.int64, device=device),
        slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
        query_starts=torch.tensor(ends, dtype=torch.int32, device=device),
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
        block_tables=torch.tensor(padded, dtype=torch.int32, device=device).reshape(len(tables), width),
        rows=torch.arange(len(tables), device=device),
        max_query=max(counts, default=0),
        max_length=max(lengths, default=0),
        mixed=1 in counts and max(counts) > 1,
        until=until,
        since=since,
    )


def see_ahead(starts: Sequence[int], counts: Sequence[int], spans: Sequence[Spans]) -> np.ndarray | None:
    """`until` and `since` of chunks [2, T] int32, as `Ragged` has them; None if no position sees a later one."""
    found, row = None, 0
    for start, count, some in zip(starts, counts, spans, strict=True):
        for first, end in within(some, start, start + count) if some else ():
            if found is None:
                at = np.concatenate(
                    [np.arange(a, a + n, dtype=np.int32) for a, n in zip(starts, counts, strict=True)]
                )
                found = np.stack((at + 1, at))
            found[:, row + first - start : row + end - start] = [[end], [first]]
        row += count
    return found


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's keys and values in the pool, as the backend that made it lays them out."""

    k: Tensor
    v: Tensor
    shape: CacheShape
    handle: Any = None  # whatever else the backend wants to have at hand
    group: int = 0  # of layers, whose blocks it is in; see groups.py


@dataclass(frozen=True, slots=True)
class Turn:
    """What queries and keys go through before they meet: an RMS norm per head where it has weights, then a rotation."""

    cos: Tensor  # [max_length, R] float32: 2 * R numbers of a head turn
    sin: Tensor
    interleaved: bool
    weights: Tensor | None = None  # [H + Hkv, D] float32
    eps: float = 0.0
    at: Tensor | None = None  # [T] int64: each token's row of cos and sin, if not its position

    def rows(self, step: Ragged) -> Tensor:
        """Each token's row of cos and sin [T] int64."""
        return step.positions if self.at is None else self.at

    def applied(self, qk: Tensor, step: Ragged) -> Tensor:
        """Heads qk [T, H + Hkv, D] turned, perhaps in place."""
        return ops.norm_rope(
            qk, self.weights, self.eps, self.cos, self.sin, self.rows(step), self.interleaved
        )


@dataclass(frozen=True, slots=True)
class Product:
    """Queries, keys and values that have still to be computed: what `ops.normed_linear` takes."""

    values: Tensor  # [T, dim]
    scale: ops.RowScale | None
    weight: Any
    bias: Tensor | None
    head_dim: int

    def heads(self) -> Tensor:
        """[T, H + 2 * Hkv, D]."""
        y = ops.normed_linear(self.values, self.scale, self.weight, self.bias)
        return y.unflatten(-1, (-1, self.head_dim))


class Backend(Protocol):
    """Attention over the paged cache on one kind of device."""

    @property
    def name(self) -> str: ...

    @property
    def block_size(self) -> int: ...

    @property
    def quantized(self) -> bool:
        """Whether it keeps keys and values as int8, with a scale for each token and head (kernels/quantized.py)."""

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold steps: nothing in them waits for the device."""

    @property
    def shares(self) -> bool:
        """Whether it is worth to say what sequences share (`Ragged.shared`)."""

    @property
    def invariant(self) -> bool:
        """Whether a position's result is the same bits whatever shares its batch and however its prompt is cut."""

    def why_not(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why this backend cannot run, or None if it can."""

    def views(self, pool: Tensor, offset: int, shape: CacheShape, dtype: torch.dtype) -> LayerCache:
        """One layer's cache in `pool` [num_blocks, block_bytes] uint8; its share starts at byte `offset`.

        `dtype`: of queries, keys, values and results.
        """

    def write(self, cache: LayerCache, k: Tensor, v: Tensor | None, step: Ragged) -> None:
        """Store k [T, Hkv, Dk] and v [T, Hkv, Dv] (None where values are in keys) at the step's slots."""

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
        """Causal attention of q [T, H, Dk] over what its sequences have cached -> [T, H, Dv].

        Heads h * H / Hkv .. (h + 1) * H / Hkv - 1 share key head h. A position sees the last `window`
        positions, itself included. Scores pass through softcap * tanh(score / softcap). `sinks` [H] float32
        are logits that take part in the softmax and have no value (Xiao et al. 2023).
        """

    def read(self, cache: LayerCache, slots: Tensor) -> Tensor:
        """The keys at slots [n], as they were written, of a cache that is not quantized -> [n, Hkv, Dk]."""

    def score(self, q: Tensor, weights: Tensor, cache: LayerCache, step: Ragged, rows: slice) -> Tensor:
        """The sum over heads of weight * relu(q . k) with the one k of each position [rows, max_length] float32.

        q [T, H, D] and weights [T, H] float32 are of all of the step's positions, `rows` of which are scored. What a
        position does not see is -inf.
        """

    def attend_turned(
        self,
        heads: Tensor,
        cache: LayerCache,
        turn: Turn,
        step: Ragged,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """`attend` of heads [T, H + 2 * Hkv, D]: queries, keys, values. May work in place.

        Queries and keys are turned, and keys and values stored, before.
        """

    def attend_product(
        self,
        product: Product,
        cache: LayerCache,
        turn: Turn,
        step: Ragged,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """`attend_turned` of the product's heads."""


@runtime_checkable
class Divisible(Backend, Protocol):
    """A backend by which several caches can have a part of a sequence's positions each (parted.py)."""

    def attend_part(
        self,
        q: Tensor,
        cache: LayerCache,
        step: Ragged,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`attend`, in float32, and the logarithm of the sum of a row's exponentials [T, H] float32.

        Sequences may be shorter than they have rows: the first of these then see nothing. Of a row that sees nothing
        the sum is 0, and the result means nothing.
        """


# A layer's: of attention, of a mixer that keeps a state, of both; of attention that chooses by keys of its own.
Cache = LayerCache | State | tuple[LayerCache, State] | tuple[LayerCache, LayerCache]


def layer_caches(
    backend: Backend,
    spec: Spec,
    pool: Tensor,
    states: Tensor | None,
    dtype: torch.dtype,
    layout: Layout | None = None,
) -> list[Cache]:
    """Each layer's view of `pool` [num_blocks, block_bytes] uint8 or of `states` [num_rows, state_bytes] uint8.

    `states`: None where no layer keeps any. `dtype`: as for `Backend.views`. `layout`: None if nothing is given up.
    """
    layout = layout or cache_layout(spec, backend.block_size, dtype.itemsize, backend.quantized)
    kept = layer_states(spec, states, dtype)
    found: list[Cache] = []
    for state, at, group, shape in zip(kept, layout.offsets, layout.groups, cache_shapes(spec), strict=True):
        if shape == NOTHING:
            found.append(state)
        else:
            views = replace(backend.views(pool, at, replace(shape, index=None), dtype), group=group)
            if shape.index is not None:
                sizes = backend.block_size, dtype.itemsize, backend.quantized
                after = at + shape.num_bytes(*sizes) - shape.index.num_bytes(*sizes)
                found.append((views, backend.views(pool, after, shape.index, dtype)))
            else:
                found.append((views, state) if state else views)
    return [found[i] for i in layers_read(spec)]


def turn_and_write(backend: Backend, cache: LayerCache, heads: Tensor, turn: Turn, step: Ragged) -> Tensor:
    """Turn the queries and keys of heads [T, H + 2 * Hkv, D], store keys and values; the queries [T, H, D]."""
    num_kv_heads = cache.shape.num_kv_heads
    num_heads = heads.shape[1] - 2 * num_kv_heads
    qk = turn.applied(heads.narrow(1, 0, num_heads + num_kv_heads), step)
    v = heads.narrow(1, num_heads + num_kv_heads, num_kv_heads)
    backend.write(cache, qk.narrow(1, num_heads, num_kv_heads), v, step)
    return qk.narrow(1, 0, num_heads)
