"""Attention over the paged cache in plain torch, on any device: the oracle, and the path without kernels."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quire.attention.base import LayerCache, Product, Ragged, Turn, turn_and_write
from quire.attention.shapes import SCALE_BYTES, CacheShape
from quire.attention.sparse import read_pages, score_spans
from quire.kernels.quantized import quantize_rows

SCORE_BYTES = 64 * 2**20  # queries are taken in pieces whose float32 scores fit in about this much


@dataclass(frozen=True, slots=True)
class Kept:
    """Keys or values of a layer, as they lie in the pool."""

    numbers: Tensor  # [num_blocks, Hkv, block_size, D]
    scales: Tensor | None = None  # [num_blocks, Hkv, block_size, parts] float32, if the numbers are int8
    parts: tuple[int, ...] = ()  # dimensions that share one

    def write(self, blocks: Tensor, offsets: Tensor, x: Tensor) -> None:
        """x [T, Hkv, D] at these blocks [T] and offsets [T]."""
        if self.scales is not None:
            integers, scales = zip(*map(quantize_rows, x.flatten(0, 1).split(self.parts, 1)), strict=True)
            self.scales[blocks, :, offsets] = torch.cat(scales, 1).unflatten(0, x.shape[:2])
            x = torch.cat(integers, 1).view(x.shape)
        self.numbers[blocks, :, offsets] = x

    def read(self, blocks: Tensor) -> Tensor:
        """What these blocks hold [Hkv, blocks * block_size, D], in float32."""
        x = self.numbers[blocks].float()
        if self.scales is not None:
            parts = torch.tensor(self.parts, device=x.device)
            x *= self.scales[blocks].repeat_interleave(parts, -1)
        return x.transpose(0, 1).flatten(1, 2)


class Reference:
    """Keys [num_blocks, Hkv, block_size, Dk] and values, likewise; float32 arithmetic."""

    name = "reference"
    capturable = False
    shares = False
    invariant = False

    def __init__(self, block_size: int = 16, *, quantized: bool = False):
        self.block_size, self.quantized = block_size, quantized

    def why_not(self, dtype: torch.dtype, device: torch.device) -> str | None:
        return None

    def views(self, pool: Tensor, offset: int, shape: CacheShape, dtype: torch.dtype) -> LayerCache:
        heads, size, how = shape.num_kv_heads, self.block_size, (dtype.itemsize, self.quantized)

        def view(start: int, head_bytes: int, *parts: int) -> Kept:
            """A token's scales are at the end of its bytes."""
            dim, scales = sum(parts), len(parts) * SCALE_BYTES
            if not self.quantized:
                flat = pool[:, start : start + heads * size * dim * dtype.itemsize].view(dtype)
                return Kept(flat.unflatten(1, (heads, size, dim)))
            rows = pool[:, start : start + heads * size * head_bytes].unflatten(1, (heads, size, head_bytes))
            return Kept(rows[..., :dim].view(torch.int8), rows[..., -scales:].view(torch.float32), parts)

        k = view(offset, shape.k_head_bytes(*how), *shape.k_parts)
        if shape.v_in_k:
            scales = None if k.scales is None else k.scales[..., :1]
            v = Kept(k.numbers[..., : shape.v_dim], scales, (shape.v_dim,))
        else:
            v = view(offset + shape.k_bytes(size, *how), shape.v_head_bytes(*how), shape.v_dim)
        return LayerCache(k.numbers, v.numbers, shape, (k, v))

    def read(self, cache: LayerCache, slots: Tensor) -> Tensor:
        return read_pages(cache, slots, self.block_size)

    def score(self, q: Tensor, weights: Tensor, cache: LayerCache, step: Ragged, rows: slice) -> Tensor:
        def multiply(x: Tensor, keys: Tensor) -> Tensor:
            return x.float() @ keys.float().T

        return score_spans(self, multiply, q, weights, cache, step, rows)

    def write(self, cache: LayerCache, k: Tensor, v: Tensor | None, step: Ragged) -> None:
        slots = step.slot_mapping
        kept = slots >= 0
        blocks, offsets = slots[kept] // self.block_size, slots[kept] % self.block_size
        keys, values = cache.handle
        keys.write(blocks, offsets, k[kept])
        if v is not None:
            values.write(blocks, offsets, v[kept])

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
        return self._attended(q, cache, step, scale, window, softcap, sinks)[0].to(q.dtype)

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
        return self._attended(q, cache, step, scale, window, softcap, None)

    def _attended(
        self,
        q: Tensor,
        cache: LayerCache,
        step: Ragged,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        out = torch.zeros(*q.shape[:2], cache.shape.v_dim, device=q.device)
        sums = torch.full(q.shape[:2], -torch.inf, device=q.device)
        starts, lengths = step.query_starts.tolist(), step.lengths.tolist()
        for s, length in enumerate(lengths):
            blocks = step.block_tables[s, : -(-length // self.block_size)].long()
            k, v = (kept.read(blocks)[:, :length] for kept in cache.handle)
            first = length - (starts[s + 1] - starts[s])
            piece = max(1, SCORE_BYTES // (4 * q.shape[1] * max(length, 1)))
            for a in range(starts[s], starts[s + 1], piece):
                b = min(a + piece, starts[s + 1])
                at = torch.arange(first + a - starts[s], first + b - starts[s], device=q.device)
                until = at + 1 if step.until is None else step.until[a:b]
                since = torch.zeros_like(at) if window is None else at + 1 - window
                if step.since is not None:
                    since = torch.minimum(since, step.since[a:b])
                out[a:b], sums[a:b] = _attend(q[a:b].float(), k, v, since, until, scale, softcap, sinks)
        return out, sums


def _attend(
    q: Tensor,  # [n, H, Dk]
    k: Tensor,  # [Hkv, length, Dk]
    v: Tensor,  # [Hkv, length, Dv]
    since: Tensor,  # [n]: the first position that a query sees
    until: Tensor,  # [n]: and the one after the last
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What the queries find [n, H, Dv], and the logarithm of the sum of their exponentials [n, H]."""
    grouped = q.unflatten(1, (k.shape[0], -1))  # [n, Hkv, G, Dk]
    scores = torch.einsum("nhgd,hld->hgnl", grouped, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(k.shape[1], device=q.device)
    scores = scores.masked_fill((at < since[:, None]) | (at >= until[:, None]), -torch.inf)
    if sinks is not None:
        sink = sinks.float().view(k.shape[0], -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), -1)
    sums = scores.logsumexp(-1, keepdim=True)
    weights = (scores - sums).exp()[..., : k.shape[1]]
    found = torch.einsum("hgnl,hld->nhgd", weights, v)
    return found.flatten(1, 2), sums.permute(2, 0, 1, 3).flatten(1)
