"""One sequence at a time, by Transformers' own attention and cache, whose contents ours keeps from step to step.

It is for networks whose layers take nobody's attention function, or count positions by the length of a cache. Sequences
of a step share nothing but the weights then, so a step takes as long as they do one after another.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quire.attention.base import LayerCache, Ragged
from quire.attention.reference import Reference
from quire.errors import UnsupportedModel
from quire.models.spec import Heads

EAGER = "eager"
PLAIN = (
    "DynamicLayer",
    "DynamicSlidingWindow",
    "LinearAttention",
)  # beginnings of layers' names in Transformers' cache


def kept_heads(body: Any, token_ids: Tensor, num_heads: int) -> tuple[Heads, ...]:
    """What each layer, of `num_heads` queries, keeps of token_ids [1, T].

    Raises:
        UnsupportedModel: not what a cache holds, keys and values of every token.
    """
    from transformers import DynamicCache

    kinds = {type(layer).__name__ for layer in DynamicCache(config=body.config).layers}
    if more := sorted(kind for kind in kinds if not kind.startswith(PLAIN)):
        raise UnsupportedModel(
            f"what {type(body).__name__} keeps of a sequence is more than keys and values ({', '.join(more)}), for"
            " which our cache has no room"
        )
    kept = _forward(body, token_ids, [])[1]
    if not kept:
        raise UnsupportedModel(f"{type(body).__name__} keeps neither keys nor values")
    if any(k.shape[-2] != token_ids.shape[-1] or v.shape[1] != k.shape[1] for k, v in kept):
        raise UnsupportedModel(
            f"{type(body).__name__} keeps something else than keys and values of every token"
        )
    return tuple(
        Heads(num_heads=num_heads, num_kv_heads=k.shape[1], k_dim=k.shape[-1], v_dim=v.shape[-1])
        for k, v in kept
    )


def compute(
    body: Any,
    token_ids: Tensor,
    step: Ragged,
    caches: Sequence[LayerCache],
    backend: Reference,
    dtype: torch.dtype,
) -> Tensor:
    """token_ids [T] -> hidden [T, dim]; `caches` are the backend's, `dtype` that of keys and values."""
    starts, lengths = step.query_starts.tolist(), step.lengths.tolist()
    parts = []
    for s, length in enumerate(lengths):
        here = slice(starts[s], starts[s + 1])
        past = length - (here.stop - here.start)
        if here.start == here.stop:
            continue
        blocks = step.block_tables[s, : -(-past // backend.block_size)].long()
        before = [_read(cache, blocks, past, dtype) for cache in caches] if past else []
        hidden, kept = _forward(body, token_ids[None, here], before)
        now = replace(step, slot_mapping=step.slot_mapping[here])
        for cache, (k, v) in zip(caches, kept, strict=True):
            backend.write(cache, k[0, :, past:].transpose(0, 1), v[0, :, past:].transpose(0, 1), now)
        parts.append(hidden[0])
    parts.append(parts[0].new_zeros(len(token_ids) - starts[-1], parts[0].shape[-1]))
    return torch.cat(parts)


def _read(cache: LayerCache, blocks: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [1, Hkv, length, D]."""
    k, v = (kept.read(blocks)[None, :, :length].to(dtype) for kept in cache.handle)
    return k, v


Kept = list[tuple[Tensor, Tensor]]


def _forward(body: Any, token_ids: Tensor, before: Kept) -> tuple[Tensor, Kept]:
    """Hidden [1, T, dim] of token_ids [1, T], and keys and values of every token, those of `before` included."""
    from transformers import DynamicCache

    cache = DynamicCache(before or None)
    hidden = body(input_ids=token_ids, past_key_values=cache, use_cache=True)[0]
    return hidden, [(layer.keys, layer.values) for layer in cache.layers if layer.is_initialized]
