"""The Triton backend: which kernel a step runs, with which tiles. Knows no layers.

Triton is imported by the first object, not by this file: machines without it import this too.
"""

import functools
import importlib.util
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quire.attention.base import LayerCache, Product, Ragged, Shared, Turn
from quire.attention.shapes import CacheShape
from quire.attention.sparse import read_pages, sequences_of
from quire.attention.triton.sizes import Tiles, halves, power_of_two, tiles_for
from quire.kernels.gpu import gpu_of

LOG2E = 1.4426950408889634
NO_WINDOW = 1 << 30
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MIN_CAPABILITY = (8, 0)  # bfloat16 products and asynchronous copies
DESCRIBED_CAPABILITY = (9, 0)  # copies by tensor descriptors
MAX_DIM = 512 + 64  # DeepSeek's latent and key, the widest that tiles were made for
DECODE_ROWS = 32  # a key head's queries of a sequence that the decode kernel takes beside one per sequence
MERGED_NUMBERS = 4096  # that a program merges at once: as many registers as it has to spare
MOST_SPLITS = 16  # programs that share pages in common; the decode kernel adds up what they leave
INTERPRETED_PROCESSORS = 3  # as many as make the interpreter divide sequences


@dataclass(frozen=True, slots=True)
class Layout:
    """One layer's cache as the kernels take it."""

    k_stride: int  # between pages, in numbers
    v_stride: int
    dims: dict[str, Any]  # constants of the kernels
    tiles: Tiles
    described: tuple[Any, Any]  # tensor descriptors of keys and values, or None


class How(NamedTuple):
    """The parameters of `Backend.attend`."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    weighs: Tensor | None = None  # [T, H] float32: for what `Divisible.attend_part` says too


@dataclass(frozen=True, slots=True)
class Share:
    """How a step's keys are divided among the programs (decode.py), and the layer that had it computed."""

    step: Ragged
    layer: LayerCache
    key: tuple[int, ...]
    most: int  # queries of a sequence that takes part
    work: Tensor  # int32
    partials: Tensor  # float32


class Triton:
    """Pages of [Hkv, block_size, D] keys, then values. Nothing here waits for the device.

    Decode steps depend on the host's numbers only through the number of sequences and `max_query`, so that one
    CUDA graph can hold a step for any lengths. A result is the same bits each time that a step is repeated. Of
    `invariant` backends it is also the same whatever shares the batch and however prompts were cut into chunks.
    """

    name = "triton"
    capturable = True

    def __init__(self, block_size: int = 64, invariant: bool = False, *, quantized: bool = False):
        self.block_size, self.invariant, self.shares = block_size, invariant, not invariant
        self.quantized = quantized
        self._shares: dict[tuple[int, ...], Share] = {}  # of the newest step

    def why_not(self, dtype: torch.dtype, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"it needs an NVIDIA GPU, and the device is {device}"
        if self.quantized:
            return "it keeps keys and values in the model's dtype, kv_cache_dtype auto, and int8 is asked for"
        if importlib.util.find_spec("triton") is None:
            return "the package triton is missing; pip install triton"
        if torch.version.cuda is None or not torch.cuda.is_available():
            return "torch finds no CUDA GPU"
        found = torch.cuda.get_device_capability(device)
        if found < MIN_CAPABILITY:
            return f"it needs compute capability 8.0, and the GPU has {found[0]}.{found[1]}"
        if dtype not in DTYPES:
            return f"it computes bfloat16, float16 and float32, and the cache is {dtype}"
        return None

    def views(self, pool: Tensor, offset: int, shape: CacheShape, dtype: torch.dtype) -> LayerCache:
        """k [num_blocks, Hkv, block_size, Dk] and v, likewise, dimensions rounded up to 16.

        Raises:
            ValueError: a head is wider than the kernels' tiles.
        """
        if max(shape.k_dim, shape.v_dim) > MAX_DIM:
            raise ValueError(
                f"heads of {shape.k_dim} (keys) and {shape.v_dim} (values) exceed the {MAX_DIM} that attention"
                " backend 'triton' computes; use attention_backend 'reference'"
            )

        def view(start: int, dim: int) -> Tensor:
            count = shape.num_kv_heads * self.block_size * dim
            flat = pool[:, start : start + count * dtype.itemsize].view(dtype)
            return flat.unflatten(1, (shape.num_kv_heads, self.block_size, dim))

        k = v = view(offset, shape.k_stored)
        if not shape.v_in_k:
            v = view(offset + shape.k_bytes(self.block_size, dtype.itemsize), shape.v_stored)
        (k0, k1), (v0, v1) = halves(shape.k_dim), halves(shape.v_dim)
        dims: dict[str, Any] = {"K0": k0, "K1": k1, "K_DIM": shape.k_dim, "K_STORED": k.shape[-1]}
        dims |= {"V0": v0, "V1": v1, "V_DIM": shape.v_dim, "V_STORED": v.shape[-1]}
        dims["V_IS_K0"] = shape.v_in_k and (v0, v1) == (k0, 0) and v0 == shape.v_dim
        dims["PRECISION"] = "ieee" if dtype is torch.float32 else "tf32"
        tiles = tiles_for(shape, dtype, pool.device)
        described = self._described(k, v, dims, tiles)
        return LayerCache(k, v, shape, Layout(k.stride(0), v.stride(0), dims, tiles, described))

    def _described(self, k: Tensor, v: Tensor, dims: dict[str, Any], tiles: Tiles) -> tuple[Any, Any]:
        """Tensor descriptors, where the hardware has them and a tile is one piece of memory."""
        whole = dims["K1"] == dims["V1"] == 0 and k.shape[-1] == dims["K0"] and v.shape[-1] == dims["V0"]
        gpu = gpu_of(k.device)
        if gpu is None or gpu.capability < DESCRIBED_CAPABILITY:
            return None, None
        if not whole or dims["V_IS_K0"] or self.block_size % tiles.tile or k.dtype is torch.float32:
            return None, None
        descriptor = _descriptor_type()
        return (
            descriptor(k.flatten(1, 2), [k.shape[0], k.shape[1] * k.shape[2], k.shape[3]],
                       [k.stride(0), k.shape[3], 1], [1, tiles.tile, k.shape[3]]),
            descriptor(v.flatten(1, 2), [v.shape[0], v.shape[1] * v.shape[2], v.shape[3]],
                       [v.stride(0), v.shape[3], 1], [1, tiles.tile, v.shape[3]]),
        )  # fmt: skip

    def write(self, cache: LayerCache, k: Tensor, v: Tensor | None, step: Ragged) -> None:
        kernels, layout, shape = _kernels("write"), _layout(cache), cache.shape
        k, v = _rows(k), v if v is None else _rows(v)
        if not len(k):
            return
        width = shape.num_kv_heads * max(shape.k_dim, shape.v_dim)
        dims = {name: layout.dims[name] for name in ("K_DIM", "K_STORED", "V_DIM", "V_STORED")}
        kernels.write[len(k), -(-width // kernels.BLOCK)](
            *(k, v, cache.k, cache.v, step.slot_mapping, k.stride(0), k.stride(1)),
            *((0, 0) if v is None else (v.stride(0), v.stride(1))),
            *(layout.k_stride, layout.v_stride),
            **dims,
            HEADS=shape.num_kv_heads,
            PAGE=self.block_size,
            COUNT=kernels.BLOCK,
        )

    def read(self, cache: LayerCache, slots: Tensor) -> Tensor:
        return read_pages(cache, slots, self.block_size)

    def score(self, q: Tensor, weights: Tensor, cache: LayerCache, step: Ragged, rows: slice) -> Tensor:
        kernels, dims, of = _kernels("score"), _layout(cache).dims, sequences_of(step)[rows]
        q, weights, width, dim = (
            _rows(q[rows]),
            weights[rows].contiguous(),
            step.max_length,
            cache.shape.k_dim,
        )
        out = torch.empty(len(q), width, device=q.device)
        kernels.score[len(q), -(-width // (kernels.TILE * kernels.TILES))](
            *(q, weights, cache.k, step.block_tables, of, step.positions[rows], out, width),
            *(
                q.stride(0),
                q.stride(1),
                weights.stride(0),
                step.block_tables.stride(0),
                _layout(cache).k_stride,
            ),
            HEADS=q.shape[1],
            ROWS=max(16, power_of_two(q.shape[1])),
            DIM=dim,
            COLUMNS=max(16, power_of_two(dim)),
            STORED=dims["K_STORED"],
            PAGE=self.block_size,
            TILE=kernels.TILE,
            TILES=kernels.TILES,
            PRECISION=dims["PRECISION"],
        )
        return out

    def place(self, cache: LayerCache, heads: Tensor, turn: Turn, step: Ragged) -> Tensor:
        kernels, layout, heads = _kernels("write"), _layout(cache), _rows(heads)
        tokens, num_kv_heads, (dim, half) = (
            len(heads),
            cache.shape.num_kv_heads,
            (heads.shape[2], turn.cos.shape[1]),
        )
        num_heads = heads.shape[1] - 2 * num_kv_heads
        rest = dim - 2 * half
        at_once = max(1, min(power_of_two(num_kv_heads), kernels.BLOCK // power_of_two(dim)))
        groups, kv_groups = -(-num_heads // at_once), -(-num_kv_heads // at_once)
        if tokens:
            kernels.place[tokens, groups + 2 * kv_groups](
                *(
                    heads,
                    cache.k,
                    cache.v,
                    step.slot_mapping,
                    turn.rows(step),
                    turn.weights,
                    turn.cos,
                    turn.sin,
                ),
                *(turn.eps, heads.stride(0), heads.stride(1), layout.k_stride, layout.v_stride),
                HEADS=num_heads,
                KV_HEADS=num_kv_heads,
                AT_ONCE=at_once,
                PAGE=self.block_size,
                DIM=dim,
                STORED=layout.dims["K_STORED"],
                HALF=half,
                WIDTH=power_of_two(half),
                REST=power_of_two(rest) if rest else 0,
                COLUMNS=power_of_two(dim),
                INTERLEAVED=turn.interleaved,
            )
        return heads.narrow(1, 0, num_heads)

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
        how = How(scale, window, softcap, sinks)
        group = (heads.shape[1] - 2 * cache.shape.num_kv_heads) // cache.shape.num_kv_heads
        if self.invariant or step.max_query > 1 or step.shared or group >= _layout(cache).tiles.most_rows:
            return self._attended(self.place(cache, heads, turn, step), None, cache, step, how)
        return self._attended(heads, turn, cache, step, how)

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
        return self._attended(q, None, cache, step, How(scale, window, softcap, sinks))

    def attend_part(self, q: Tensor, cache: LayerCache, step: Ragged, **how: Any) -> tuple[Tensor, Tensor]:
        weighs = torch.full(q.shape[:2], -torch.inf, device=q.device)
        return self._attended(q, None, cache, step, How(**how, weighs=weighs)), weighs

    def _attended(self, q: Tensor, turn: Turn | None, cache: LayerCache, step: Ragged, how: How) -> Tensor:
        """Attention of q [T, H, D], or with `turn` of heads as `attend_turned` takes them, one for each sequence."""
        q, num_seqs, num_kv_heads = _rows(q), step.lengths.shape[0], cache.shape.num_kv_heads
        tokens, heads = len(q), q.shape[1] - (2 * num_kv_heads if turn else 0)
        if num_seqs == 0 or tokens == 0:
            return q.new_zeros(tokens, heads, cache.shape.v_dim)
        dtype = q.dtype if how.weighs is None else torch.float32
        out = q.new_empty(tokens, heads, cache.shape.v_dim, dtype=dtype)
        group, window, softcap = heads // num_kv_heads, how.window, how.softcap
        common = (step.lengths, step.query_starts)
        scales = (how.scale * LOG2E, 0.0)
        if softcap is not None:
            scales = (2 * LOG2E * how.scale / softcap, softcap * LOG2E)
        if window is None or (window >= step.max_length and not self.invariant):
            window = NO_WINDOW
        rest = (
            *(out, how.weighs, how.sinks, *scales, window, num_seqs, tokens, q.stride(0), q.stride(1)),
            *(step.block_tables.stride(0), _layout(cache).k_stride, _layout(cache).v_stride),
        )
        constants = {
            **_layout(cache).dims,
            "HEADS": heads,
            "GROUP": group,
            "PAGE": self.block_size,
            "CAPPED": softcap is not None,
        }
        few = step.max_query == 1 or (step.until is None and step.max_query * group <= DECODE_ROWS)
        most = 0 if self.invariant else step.max_query if few else 1 if step.mixed else 0
        if most:
            shared = step.shared if most == 1 and window == NO_WINDOW else None
            rows = most * group + (turn is not None)  # the key is turned with its queries
            turned = step.positions if turn is None else turn.rows(step)
            share, sizes = self._share(cache, step, shared, most, (most * group, rows), window)
            inputs = (q, cache.k, cache.v, step.block_tables, *common, step.slot_mapping, turned)
            left, sizes["SPLITS"] = None, 0
            if shared is not None:
                left, sizes["SPLITS"] = self._left(q, cache, step, shared, scales, constants)
            self._decode(inputs, (share, left), turn, rest, constants | sizes)
        if most < step.max_query:
            self._prefill(
                (q, cache.k, cache.v),
                (step.block_tables, *common, step.until, step.since, most + 1),
                cache,
                rest,
                constants,
            )
        return out

    def _decode(
        self,
        inputs: tuple[Any, ...],
        division: tuple[Share, Any],
        turn: Turn | None,
        rest: tuple[Any, ...],
        constants: dict[str, Any],
    ) -> None:
        share, left = division
        kernels, tiles = _kernels("decode"), _layout(share.layer).tiles
        turning = (None, None, None, 0.0) if turn is None else (turn.weights, turn.cos, turn.sin, turn.eps)
        constants |= {
            "HALF": turn.cos.shape[1] if turn else 0,
            "INTERLEAVED": bool(turn and turn.interleaved),
        }
        q, linear, machine = inputs[0], _products("linear"), _products("machine")
        # With several queries, what follows is a product whose programs would take the room of those that still run.
        when = linear.EARLY if len(q) == 1 else linear.LATE
        constants |= machine.following(q.device, when, q.shape[-1], q.stride(0))
        constants["WINDOWED"] = rest[5] != NO_WINDOW
        kernels.decode[(share.key[0],)](
            *(*inputs, share.work, share.partials, left, share.most, *turning, *rest),
            **constants,
            TILE=tiles.decode_tile,
            STAGES=tiles.decode_stages,
            num_warps=tiles.decode_warps * (2 if constants["ROWS"] > DECODE_ROWS else 1),
        )

    def _left(
        self,
        q: Tensor,
        cache: LayerCache,
        step: Ragged,
        shared: Shared,
        scales: tuple[float, float],
        constants: dict[str, Any],
    ) -> tuple[Any, int]:
        """Attention to the pages that sequences share, and among how many programs these were divided."""
        kernels, layout, dims = _kernels("shared"), _layout(cache), constants
        tiles, num_seqs = layout.tiles, len(step.lengths)
        (num_groups, size), num_kv_heads = shared.members.shape, cache.shape.num_kv_heads
        rows = min(max(16, power_of_two(size * dims["GROUP"])), tiles.rows)
        parts = -(-size * dims["GROUP"] // rows)
        busy = -(-num_seqs // size) * parts * num_kv_heads  # programs, if all sequences share
        splits = min(max(2 * _num_processors(q.device) // busy, 1), MOST_SPLITS)
        shape = (splits, num_seqs, dims["HEADS"])
        values = q.new_empty(*shape, dims["V0"] + dims["V1"], dtype=torch.float32)
        left = kernels.Left(shared.num_pages, values, values.new_empty(*shape, 2))
        kernels.attend[(num_groups * parts * num_kv_heads, splits)](
            *(q, cache.k, cache.v, step.block_tables, step.query_starts, shared.members, shared.member_pages),
            *(left, *scales, num_seqs, q.stride(0), q.stride(1), step.block_tables.stride(0)),
            *(layout.k_stride, layout.v_stride),
            **constants,
            SEQS=size,
            PARTS=parts,
            ROWS=rows,
            TILE=tiles.decode_tile,
            STAGES=tiles.stages,
            num_warps=tiles.warps,
        )
        return left, splits

    def _prefill(
        self,
        inputs: tuple[Any, ...],
        step: tuple[Any, ...],
        cache: LayerCache,
        rest: tuple[Any, ...],
        constants: dict[str, Any],
    ) -> None:
        layout = _layout(cache)
        tiles, tokens, num_seqs = layout.tiles, inputs[0].shape[0], step[1].shape[0]
        num_tiles = tokens * constants["GROUP"] // tiles.rows + num_seqs
        _kernels("prefill").prefill[(num_tiles * cache.shape.num_kv_heads,)](
            *(*inputs, *layout.described, *step, *rest),
            **constants,
            ROWS=tiles.rows,
            TILE=tiles.tile,
            STAGES=tiles.stages,
            WINDOWED=rest[5] != NO_WINDOW,
            num_warps=tiles.warps,
        )

    def _share(
        self,
        cache: LayerCache,
        step: Ragged,
        shared: Shared | None,
        most: int,
        num_rows: tuple[int, int],
        window: int,
    ) -> tuple[Share, dict[str, int]]:
        """The division of sequences with up to `most` queries, of what they do not share, and its sizes.

        A key head has so many rows of results, and so many in all.

        Layers of equal shape and window have it computed once.

        A layer attends once a step. If the one that had it computed comes again, the step has new contents: its
        tensors are written in place where CUDA graphs are replayed.
        """
        kernels, layout, shape = _kernels("decode"), _layout(cache), cache.shape
        rows = min(max(16, power_of_two(num_rows[1])), layout.tiles.most_rows)
        groups = -(-num_rows[1] // rows)
        count = min(rows, power_of_two(num_rows[0]))
        pairs = shape.num_kv_heads * groups
        num_seqs, device = step.lengths.shape[0], step.lengths.device
        num_programs = _num_programs(num_seqs * pairs, step.max_length, shape, device)
        width = layout.dims["V0"] + layout.dims["V1"]
        sizes = {"ROWS": rows, "GROUPS": groups, "COUNT": count}
        sizes["AT_ONCE"] = max(1, MERGED_NUMBERS // (count * power_of_two(width)))
        key = (num_programs, pairs, window, most, count, width, layout.tiles.decode_tile, id(step.lengths))
        if any(share.step.positions is not step.positions for share in self._shares.values()):
            self._shares.clear()
        found = self._shares.get(key)
        if found is not None and found.layer is not cache:
            return found, sizes
        share = Share(
            step=step,
            layer=cache,
            key=key,
            most=most,
            work=torch.empty(2 + num_programs + num_seqs * (1 + pairs), dtype=torch.int32, device=device),
            partials=torch.empty(2 * num_programs * count * (width + 2), device=device),
        )
        kernels.divide[(-(-num_programs // kernels.PROGRAMS),)](
            *(step.lengths, step.query_starts, None if shared is None else shared.num_pages, share.work),
            *(num_seqs, pairs, num_programs, most, window),
            PAGE=self.block_size,
            TILE=layout.tiles.decode_tile,
            COUNT=kernels.PROGRAMS,
        )
        self._shares[key] = share
        return share, sizes


def _num_programs(pairs: int, max_length: int, shape: CacheShape, device: torch.device) -> int:
    """Programs of the decode kernel: 1, 2 or 4 per processor, more where there are many sequences.

    Few programs leave less to merge, more of them hide each other's waits (measured; see benchmarks/gpu).
    """
    processors = _num_processors(device)
    if max(shape.k_dim, shape.v_dim) > 256 or pairs <= 16 and max_length <= 4096:
        return processors
    return processors * (2 if pairs < 512 else 4)


def _num_processors(device: torch.device) -> int:
    gpu = gpu_of(device)
    return INTERPRETED_PROCESSORS if gpu is None else gpu.processors


def _kernels(name: str) -> ModuleType:
    """write, decode or prefill: a file of kernels, which imports Triton."""
    return importlib.import_module(f"quire.attention.triton.{name}")


def _products(name: str) -> ModuleType:
    """A file of kernels/triton, which imports Triton."""
    return importlib.import_module(f"quire.kernels.triton.{name}")


@functools.cache
def _descriptor_type() -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor


def _layout(cache: LayerCache) -> Layout:
    if not isinstance(cache.handle, Layout):
        raise TypeError(f"a cache of another backend: its handle is {type(cache.handle).__name__}")
    return cache.handle


def _rows(x: Tensor) -> Tensor:
    """x [T, H, D] with the numbers of a head side by side."""
    return x if x.stride(2) == 1 else x.contiguous()
