"""Attention over the paged cache in plain torch, on any device: the oracle, and the path without kernels."""

from typing import Any

import torch
from torch import Tensor

from quire.attention.base import LayerCache, Ragged, Turn, turn_and_write
from quire.attention.shapes import CacheShape

SCORE_BYTES = 64 * 2**20  # queries are taken in pieces whose float32 scores fit in about this much


class Reference:
    """Keys [num_blocks, Hkv, block_size, Dk] and values, likewise; float32 arithmetic."""

    name = "reference"
    capturable = False
    shares = False

    def __init__(self, block_size: int = 16):
        self.block_size = block_size

    def why_not(self, dtype: torch.dtype, device: torch.device) -> str | None:
        return None

    def views(self, pool: Tensor, offset: int, shape: CacheShape, dtype: torch.dtype) -> LayerCache:
        heads, size = shape.num_kv_heads, self.block_size

        def view(start: int, dim: int) -> Tensor:
            count = heads * size * dim
            flat = pool[:, start : start + count * dtype.itemsize].view(dtype)
            return flat.unflatten(1, (heads, size, dim))

        k = view(offset, shape.k_dim)
        if shape.v_in_k:
            return LayerCache(k, k[..., : shape.v_dim], shape)
        return LayerCache(k, view(offset + shape.k_bytes(size, dtype.itemsize), shape.v_dim), shape)

    def write(self, cache: LayerCache, k: Tensor, v: Tensor | None, step: Ragged) -> None:
        slots = step.slot_mapping
        kept = slots >= 0
        blocks, offsets = slots[kept] // self.block_size, slots[kept] % self.block_size
        cache.k[blocks, :, offsets] = k[kept]
        if v is not None:
            cache.v[blocks, :, offsets] = v[kept]

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
            k, v = (t[blocks].transpose(0, 1).flatten(1, 2)[:, :length].float() for t in (cache.k, cache.v))
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
