"""Attention over the paged cache in plain torch, on any device: the oracle, and the path without kernels."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quire.attention.base import LayerCache, Ragged, Turn, turn_and_write
from quire.attention.shapes import CacheShape, head_bytes
from quire.kernels.quantized import quantize_rows

SCORE_BYTES = 64 * 2**20  # queries are taken in pieces whose float32 scores fit in about this much


@dataclass(frozen=True, slots=True)
class Kept:
    """Keys or values of a layer, as they lie in the pool."""

    numbers: Tensor  # [num_blocks, Hkv, block_size, D]
    scales: Tensor | None  # [num_blocks, Hkv, block_size, 1] float32, if the numbers are int8

    def write(self, blocks: Tensor, offsets: Tensor, x: Tensor) -> None:
        """x [T, Hkv, D] at these blocks [T] and offsets [T]."""
        if self.scales is not None:
            integers, scales = quantize_rows(x.flatten(0, 1))
            self.scales[blocks, :, offsets] = scales.view(*x.shape[:2], 1)
            x = integers.view(x.shape)
        self.numbers[blocks, :, offsets] = x

    def read(self, blocks: Tensor) -> Tensor:
        """What these blocks hold [Hkv, blocks * block_size, D], in float32."""
        x = self.numbers[blocks].float()
        if self.scales is not None:
            x *= self.scales[blocks]
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
        heads, size, itemsize = shape.num_kv_heads, self.block_size, dtype.itemsize

        def view(start: int, dim: int, stored: int) -> Kept:
            if self.quantized:  # a token's scale is behind its numbers
                token_bytes = head_bytes(stored, itemsize, True)
                rows = pool[:, start : start + heads * size * token_bytes]
                rows = rows.unflatten(1, (heads, size, token_bytes))
                return Kept(rows[..., :dim].view(torch.int8), rows[..., stored:].view(torch.float32))
            flat = pool[:, start : start + heads * size * dim * itemsize].view(dtype)
            return Kept(flat.unflatten(1, (heads, size, dim)), None)

        k = view(offset, shape.k_dim, shape.k_stored)
        if shape.v_in_k:
            v = Kept(k.numbers[..., : shape.v_dim], k.scales)
        else:
            start = offset + shape.k_bytes(size, itemsize, self.quantized)
            v = view(start, shape.v_dim, shape.v_stored)
        return LayerCache(k.numbers, v.numbers, shape, (k, v))

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
        out = q.new_zeros(q.shape[0], q.shape[1], cache.shape.v_dim)
        starts, lengths = step.query_starts.tolist(), step.lengths.tolist()
        for s, length in enumerate(lengths):
            blocks = step.block_tables[s, : -(-length // self.block_size)].long()
            k, v = (kept.read(blocks)[:, :length] for kept in cache.handle)
            first = length - (starts[s + 1] - starts[s])
            piece = max(1, SCORE_BYTES // (4 * q.shape[1] * max(length, 1)))
            for a in range(starts[s], starts[s + 1], piece):
                b = min(a + piece, starts[s + 1])
                at = torch.arange(first + a - starts[s], first + b - starts[s], device=q.device)
                out[a:b] = _attend(q[a:b].float(), k, v, at, scale, window, softcap, sinks)
        return out


def _attend(
    q: Tensor,  # [n, H, Dk]
    k: Tensor,  # [Hkv, length, Dk]
    v: Tensor,  # [Hkv, length, Dv]
    positions: Tensor,  # [n]
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    grouped = q.unflatten(1, (k.shape[0], -1))  # [n, Hkv, G, Dk]
    scores = torch.einsum("nhgd,hld->hgnl", grouped, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(k.shape[1], device=q.device)
    hidden = at > positions[:, None]
    if window is not None:
        hidden |= at <= positions[:, None] - window
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        sink = sinks.float().view(k.shape[0], -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), -1)
    weights = scores.softmax(-1)[..., : k.shape[1]]
    return torch.einsum("hgnl,hld->nhgd", weights, v).flatten(1, 2)
