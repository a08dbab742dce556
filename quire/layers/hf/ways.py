"""Transformers' modules that keep states otherwise than in its cache: how each is given its own, and leaves it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

LOWEST = -1e30  # RWKV's greatest exponent of no positions, as its own beginning has it

Parts = dict[tuple[str, int], Tensor]  # [B, ...] by kind and number; none at the beginning of a sequence
Way = Callable[[Any, Callable[..., Any], Mapping[str, Any], Parts], Any]


def griffin(module: Any, forward: Callable[..., Any], inputs: Mapping[str, Any], parts: Parts) -> Any:
    """In attributes of its own, and of the recurrence inside."""
    x, inner = inputs["input_states"], module.rg_lru
    if not parts:
        parts["conv", 0] = x.new_zeros(len(x), module.lru_width, module.conv1d_width - 1)
        parts["recurrent", 0] = x.new_zeros(len(x), module.lru_width, dtype=torch.float32)
    module.conv1d_state, inner.recurrent_states = parts["conv", 0], parts["recurrent", 0]
    out = forward(**{**inputs, "use_cache": True})
    parts["conv", 0], parts["recurrent", 0] = module.conv1d_state, inner.recurrent_states
    module.conv1d_state = inner.recurrent_states = None
    return out


def rwkv(module: Any, forward: Callable[..., Any], inputs: Mapping[str, Any], parts: Parts) -> Any:
    """In a list of five tensors for all layers, each layer a column; right for one sequence at a time."""
    x, inner = inputs["hidden"], module.attention.attention_hidden_size
    if not parts:
        parts |= {("conv", i): x.new_zeros(len(x), x.shape[-1]) for i in range(2)}
        parts |= {("recurrent", i): x.new_zeros(len(x), inner, dtype=torch.float32) for i in range(3)}
        parts["recurrent", 2].fill_(LOWEST)
    columns = {key: part[..., None].repeat(1, 1, module.layer_id + 1) for key, part in parts.items()}
    rows = []
    for i, row in enumerate(x.split(1)):
        mine = [column[i : i + 1] for column in columns.values()]
        rows.append(forward(**{**inputs, "hidden": row, "state": mine})[0])
    parts |= {key: column[..., -1] for key, column in columns.items()}
    return torch.cat(rows), None, None


def xlstm(module: Any, forward: Callable[..., Any], inputs: Mapping[str, Any], parts: Parts) -> Any:
    """In an argument, of the type of its inputs, and beside the result."""
    x, layer, num_heads = inputs["x"], module.mlstm_layer, module.config.num_heads
    if not parts:  # which a single position needs
        k_dim, v_dim = layer.qk_dim // num_heads, layer.v_dim // num_heads
        zeros = (x.new_zeros(len(x), num_heads, *shape) for shape in ((k_dim, v_dim), (k_dim,), (1,)))
        parts |= {("recurrent", i): part for i, part in enumerate(zeros)}
    out, state = forward(**{**inputs, "state": tuple(parts.values())})
    parts |= {("recurrent", i): part.to(x.dtype) for i, part in enumerate(state)}
    return out, None


WAYS: Mapping[str, Way] = {
    "RecurrentGemmaRecurrentBlock": griffin,
    "RwkvBlock": rwkv,
    "xLSTMBlock": xlstm,
}
