"""Gemma 4 (text): layers of two shapes, the last of which read others' keys and values; embeddings for each layer."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from quire.models.common import (
    activation,
    attention,
    biases,
    decoder,
    layer_types,
    mlp,
    rope,
    sandwich,
    tied_by_default,
)
from quire.models.hf import HF
from quire.models.names import SANDWICH, STACKED, Names, Split
from quire.models.spans import spans_of
from quire.models.spec import MLP, Apart, Attention, Block, Decoder, LayerEmbedding, MoE, Norm, Rope

GLOBAL_HEAD_DIM, SHAPE = 512, {"head_dim", "num_key_value_heads"}
SPARSE = (
    *SANDWICH,
    (r"\.mlp\.(gate|up|down)_proj\.", r".mlp.shared.\1_proj."),
    (r"\.router\.proj\.", ".mlp.gate."),
    (r"\.router\.scale$", ".mlp.router_norm.weight"),
    (r"\.router\.per_expert_scale$", ".mlp.gate.per_expert_scale"),
    (r"\.pre_feedforward_layernorm_2\.", ".mlp.experts_norm."),
    (r"\.post_feedforward_layernorm_1\.", ".mlp.shared_post_norm."),
    (r"\.post_feedforward_layernorm_2\.", ".mlp.experts_post_norm."),
    (r"(\d)\.experts\.", r"\1.mlp.experts."),
)


def gemma4(c: HF) -> tuple[Decoder, Names]:
    """Five of six layers are local and of another shape than the others; the last one is not."""
    c.refuse(
        (both := c.use_bidirectional_attention) not in (None, "vision"),
        f"use_bidirectional_attention={both!r}",
    )
    local = layer_types(c, lambda i: (i + 1) % 6 != 0)
    local[-1] = False
    shares, norm, sparse = shared_layers(c, local), Norm(eps=c.number("rms_norm_eps")), c.enable_moe_block
    c.skip("num_experts", "top_k_experts", "moe_intermediate_size", "vocab_size_per_layer_input")
    wide = 2 if c.use_double_wide_mlp else 1
    embedding, changes = layer_embedding(c, norm)
    shapes = _shapes(c, local)
    mixers = {here: _attention(c, here, shapes[here], norm) for here in set(local)}

    def block(i: int) -> Block:
        hidden = c.count("intermediate_size") * (1 if shares[i] is None else wide)
        dense = mlp(c, act=c.text("hidden_activation"), hidden=hidden)
        feed_forward = _experts(c, dense, norm) if sparse else dense
        mixer = replace(mixers[local[i]], shares=shares[i])
        return sandwich(mixer, feed_forward, norm, embedding=embedding, scalar=True)

    changes |= {"embed_scale": c.count("hidden_size") ** 0.5, "tied": tied_by_default(c)}
    spec = decoder(c, block, norm, logit_softcap=c.final_logit_softcapping, **changes)
    unused = unused_keys(shares)
    if not sparse:
        return spec, Names(renames=SANDWICH, ignored=unused)
    hidden = c.count("moe_intermediate_size")
    splits = {"gate_up_proj": Split({"gate_proj": hidden, "up_proj": hidden})}
    return spec, Names(renames=SPARSE, splits=splits, stacked=STACKED, ignored=unused)


def shared_layers(c: HF, local: Sequence[bool]) -> list[int | None]:
    """For each layer, the last of its kind before those that share, if it is one of them."""
    count = c.stated("num_kv_shared_layers") or 0
    first = len(local) - count
    own = {kind: i for i, kind in enumerate(local[: max(first, 0)])}
    c.refuse(
        not 0 <= count <= len(local) or count > 0 and set(own) != set(local),
        f"num_kv_shared_layers={count} with layer_types that have no layer of each kind before those",
    )
    return [own[kind] if i >= first else None for i, kind in enumerate(local)]


def unused_keys(shares: Sequence[int | None]) -> tuple[str, ...]:
    """A pattern of what checkpoints have of layers that share, and nobody reads."""
    layers = "|".join(str(i) for i, other in enumerate(shares) if other is not None)
    return (rf"^layers\.({layers})\.mixer\.[kv]_",) if layers else ()


def layer_embedding(c: HF, norm: Norm) -> tuple[LayerEmbedding | None, dict[str, Any]]:
    """What each layer has, and the decoder's fields that belong to it."""
    size = c.stated("hidden_size_per_layer_input")
    if not size:
        return None, {}
    act = activation(c, c.text("hidden_activation"))
    rows = c.count("vocab_size_per_layer_input")
    return LayerEmbedding(dim=c.count("hidden_size_per_layer_input"), act=act, norm=norm), {
        "layer_rows": rows
    }


def _attention(c: HF, local: bool, shape: Mapping[str, Any], norm: Norm) -> Attention:
    size = shape.get("head_dim") or c.count("head_dim")
    return attention(
        c,
        head_dim=size,
        num_kv_heads=shape.get("num_key_value_heads") or c.count("num_key_value_heads"),
        rope=_rope(c, local, size),
        qk_norm=norm,
        v_norm=Norm(eps=norm.eps, weight=False),
        keys_as_values=bool(c.attention_k_eq_v) and not local,
        scale=1.0,
        window=c.count("sliding_window") if local else None,
        spans=spans_of(c, local),
        **biases(c),
    )


def _shapes(c: HF, local: Sequence[bool]) -> Mapping[bool, Mapping[str, Any]]:
    """What is different in layers that are local or not, as Hugging Face saves it by layer, or as published."""
    size, num_kv_heads = c.get("global_head_dim", GLOBAL_HEAD_DIM), c.num_global_key_value_heads
    if c.per_layer_config is None:
        shape = {"head_dim": size, "num_key_value_heads": num_kv_heads if c.attention_k_eq_v else None}
        return {True: {}, False: shape}
    by_layer = {int(i): shape for i, shape in c.per_layer_config.items()}
    other = {key for shape in by_layer.values() for key in shape} - SHAPE
    c.refuse(bool(other), f"per_layer_config of {', '.join(sorted(other))}")
    shapes = {kind: by_layer.get(i, {}) for i, kind in enumerate(local)}
    mixed = any(by_layer.get(i, {}) != shapes[kind] for i, kind in enumerate(local))
    c.refuse(mixed, "per_layer_config that differs within one of layer_types")
    return shapes


def _rope(c: HF, local: bool, size: int) -> Rope:
    if c.rope_parameters is not None:
        return rope(c, size, local=local)
    if local:
        return Rope(dim=size, theta=10_000.0)
    scaling = {"rope_type": "proportional", "partial_rotary_factor": 0.25}
    return Rope(dim=size, theta=1_000_000.0, scaling=scaling)


def _experts(c: HF, shared: MLP, norm: Norm) -> MoE:
    return MoE(
        num_experts=c.count("num_experts"),
        top_k=c.count("top_k_experts"),
        expert=mlp(c, act=shared.act, hidden=c.count("moe_intermediate_size")),
        shared=shared,
        apart=Apart(norm=norm, router_scale=c.count("hidden_size") ** -0.5),
    )
