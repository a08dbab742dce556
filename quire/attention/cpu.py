"""Attention on a CPU, by C++ that reads the cache's pages where they lie (kernels/cpu/attention.cpp)."""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from quire.attention.base import LayerCache, Product, Ragged, Turn, turn_and_write
from quire.attention.shapes import DIM_STEP, CacheShape
from quire.attention.sparse import score_spans
from quire.kernels import ops
from quire.kernels.cpu.calls import kept_at, kernel
from quire.kernels.cpu.native import isa, load
from quire.kernels.cpu.products import (
    BLOCK_OUTPUTS,
    MOST_HEAD_DIM,
    Fused,
    Machine,
    multiply,
    pointer,
    takes_more,
)

PAGE_TOKENS = 16
UNIT_BYTES = 4
MOST_LAID_OUT = 8  # steps, and views of them, whose form for the kernels is remembered


class _Cache(ctypes.Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("k", "v")],
        *[(name, c_int64) for name in ("block_stride", "num_kv_heads", "k_dim", "v_dim")],
        *[(name, c_int64) for name in ("k_stored", "v_stored", "k_first", "pages_per_block")],
        *[(name, c_int32) for name in ("is_bf16", "is_quantized", "isa")],
    ]


class _Heads(ctypes.Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("cache", "slots", "positions", "weights", "cos", "sin")],
        *[(name, c_int64) for name in ("num_queries", "size", "half")],
        ("eps", c_float),
        ("interleaved", c_int32),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("query_starts", "lengths", "tables", "slots")],
        *[(name, c_int64) for name in ("max_blocks", "num_threads")],
        *[(name, c_void_p) for name in ("until", "since")],
    ]


class Cpu:
    """Pages of 16 tokens, keys and values interleaved for dot products without reductions.

    A position's result is the same bits whatever shares its batch and however its prompt was cut into chunks.
    """

    name = "cpu"
    capturable = False
    shares = False
    invariant = True

    def __init__(self, block_size: int = PAGE_TOKENS, level: int | None = None, *, quantized: bool = False):
        """`level`: the instruction set (see native.isa); None for the best there is."""
        self.block_size, self.quantized = block_size, quantized
        self.level = isa() if level is None else level
        self._laid_out: list[tuple[Ragged, _Step]] = []
        library, self._reason = load()
        if library is not None:
            self._write, self._attend = kernel("quire_write"), kernel("quire_attend")

    def why_not(self, dtype: torch.dtype, device: torch.device) -> str | None:
        if self._reason:
            return self._reason
        if device.type != "cpu":
            return f"it needs a CPU, and the device is {device}"
        if dtype not in (torch.float32, torch.bfloat16):
            return f"it computes float32 and bfloat16, and the cache is {dtype}"
        if self.block_size % PAGE_TOKENS:
            return f"its blocks hold multiples of {PAGE_TOKENS} tokens, and block_size is {self.block_size}"
        return None

    def views(self, pool: Tensor, offset: int, shape: CacheShape, dtype: torch.dtype) -> LayerCache:
        """k [num_blocks, Hkv, pages, page_bytes] uint8 and v, likewise: attention.cpp says what is in a page."""
        heads, pages = shape.num_kv_heads, self.block_size // PAGE_TOKENS
        how = dtype.itemsize, self.quantized

        def view(start: int, head_bytes: int) -> Tensor:
            page_bytes = PAGE_TOKENS * head_bytes
            return pool[:, start : start + heads * pages * page_bytes].unflatten(
                1, (heads, pages, page_bytes)
            )

        k = v = view(offset, shape.k_head_bytes(*how))
        if not shape.v_in_k:
            v = view(offset + shape.k_bytes(self.block_size, *how), shape.v_head_bytes(*how))
        handle = _Cache(
            k=k.data_ptr(),
            v=None if shape.v_in_k else v.data_ptr(),
            block_stride=pool.stride(0) // UNIT_BYTES,
            num_kv_heads=heads,
            k_dim=shape.k_dim,
            v_dim=shape.v_dim,
            k_stored=shape.k_stored,
            v_stored=-(-shape.v_dim // DIM_STEP) * DIM_STEP,
            k_first=shape.k_parts[0],
            pages_per_block=pages,
            is_bf16=dtype is torch.bfloat16,
            is_quantized=self.quantized,
            isa=self.level,
        )
        return LayerCache(k, v, shape, handle)

    def write(self, cache: LayerCache, k: Tensor, v: Tensor | None, step: Ragged) -> None:
        k, v = _packed(k), v if v is None else _packed(v)
        self._write(
            *(ctypes.addressof(cache.handle), self._layout(step), k.data_ptr(), k.stride(0)),
            *((0, 0) if v is None else (v.data_ptr(), v.stride(0))),
            len(step.positions),
        )

    def read(self, cache: LayerCache, slots: Tensor) -> Tensor:
        dtype, dim = (torch.bfloat16 if cache.handle.is_bf16 else torch.float32), cache.shape.k_dim
        units = cache.k.view(dtype).unflatten(-1, (-1, PAGE_TOKENS, UNIT_BYTES // dtype.itemsize))
        blocks, inside = slots.long() // self.block_size, slots.long() % self.block_size
        return units[blocks, :, inside // PAGE_TOKENS, :, inside % PAGE_TOKENS].flatten(2)[..., :dim]

    def score(self, q: Tensor, weights: Tensor, cache: LayerCache, step: Ragged, rows: slice) -> Tensor:
        def multiply(x: Tensor, keys: Tensor) -> Tensor:
            return ops.linear(x, ops.pack_linear(keys, True), None, torch.float32)

        return score_spans(self, multiply, q, weights, cache, step, rows)

    def attend_turned(self, heads: Tensor, cache: LayerCache, turn: Turn, step: Ragged, **how: Any) -> Tensor:
        return self.attend(turn_and_write(self, cache, heads, turn, step), cache, step, **how)

    def attend_product(
        self, product: Product, cache: LayerCache, turn: Turn, step: Ragged, **how: Any
    ) -> Tensor:
        q = self.finish_heads(product, cache, turn, step)
        if q is None:
            return self.attend_turned(product.heads(), cache, turn, step, **how)
        return self.attend(q, cache, step, **how)

    def finish_heads(self, product: Product, cache: LayerCache, turn: Turn, step: Ragged) -> Tensor | None:
        """`turn_and_write` as the product finishes; None if it takes several operations."""
        size, num_kv_heads, values = product.head_dim, cache.shape.num_kv_heads, product.values
        if (
            size % BLOCK_OUTPUTS
            or size > MOST_HEAD_DIM
            or not takes_more(values, product.weight, product.scale)
        ):
            return None
        num_queries = product.weight.outputs // size - 2 * num_kv_heads
        heads = _Heads(
            cache=ctypes.addressof(cache.handle),
            slots=step.slot_mapping.data_ptr(),
            positions=turn.rows(step).data_ptr(),
            weights=pointer(turn.weights),
            cos=turn.cos.data_ptr(),
            sin=turn.sin.data_ptr(),
            num_queries=num_queries,
            size=size,
            half=turn.cos.shape[1],
            eps=turn.eps,
            interleaved=turn.interleaved,
        )
        q = torch.empty((len(values), num_queries, size), dtype=values.dtype)
        fused = Fused.scaled(product.scale, heads=kept_at(heads))
        machine = Machine(self.level, torch.get_num_threads())
        multiply(values, product.weight, product.bias, q, machine, fused)
        return q

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
        q = _packed(q)
        tokens, heads, _ = q.shape
        out = torch.empty((tokens, heads, cache.shape.v_dim), dtype=q.dtype)
        self._attend(
            *(ctypes.addressof(cache.handle), self._layout(step)),
            *(q.data_ptr(), heads, q.stride(0), out.data_ptr()),
            *(scale, softcap or 0.0, window or 0, 0 if sinks is None else sinks.data_ptr()),
            *(len(step.lengths), len(step.positions)),
        )
        return out

    def _layout(self, step: Ragged) -> int:
        """The address of the step as the kernels take it; made once for all layers that see it alike."""
        found = next((one for one in self._laid_out if one[0] is step), None)
        if found is None:
            native = _Step(
                query_starts=step.query_starts.data_ptr(),
                lengths=step.lengths.data_ptr(),
                tables=step.block_tables.data_ptr(),
                slots=step.slot_mapping.data_ptr(),
                max_blocks=step.block_tables.stride(0),
                num_threads=torch.get_num_threads(),
                until=pointer(step.until),
                since=pointer(step.since),
            )
            found = (step, native)
            self._laid_out = [*self._laid_out[1 - MOST_LAID_OUT :], found]
        return kept_at(found[1])


def _packed(x: Tensor) -> Tensor:
    """x [T, H, D] with the heads of a position side by side; positions may be further apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
