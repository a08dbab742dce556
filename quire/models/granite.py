"""Granite 3 and 4, HyperCLOVA X: Llama with a multiplier at each end of each part; experts; state spaces."""

from dataclasses import replace
from typing import Any

from quire.errors import ModelError
from quire.models.common import (
    attention,
    biases,
    decoder,
    head_dim,
    kv_heads,
    layer_types,
    mlp,
    pre_norm,
    rope,
    tied_by_default,
)
from quire.models.hf import HF
from quire.models.mamba import is_attention, scanning
from quire.models.names import LLAMA, STACKED, Names, Split
from quire.models.spec import Attention, Block, Decoder, MoE, Norm

PLAIN_MLP = (
    (r"\.shared_mlp\.output_linear\.", ".mlp.down_proj."),
    (r"\.shared_mlp\.", ".mlp."),
)


def granite(c: HF) -> tuple[Decoder, Names]:
    block = _block(c, scale=c.number("attention_multiplier"))
    return decoder(c, block, _norm(c), **_scales(c)), Names(renames=LLAMA)


def granite_swa(c: HF) -> tuple[Decoder, Names]:
    """All but every fourth layer are local; sinks; a rotary base of each layer's own, of which 0 is none."""
    local = layer_types(c, lambda i: i % 4 != 0)
    sliding = c.get("sliding_window", 128) or None
    rotary, bases = rope(c, head_dim(c)), c.layer_rope_theta

    def block(i: int) -> Block:
        base = bases[i] if bases else rotary.theta
        here = replace(rotary, theta=base) if base else None
        window = sliding if local[i] else None
        return _block(c, scale=c.number("attention_multiplier"), rope=here, window=window, sinks=True)

    return decoder(c, block, _norm(c), **_scales(c), tied=tied_by_default(c)), Names(renames=LLAMA)


def hyperclovax(c: HF) -> tuple[Decoder, Names]:
    """Logits are multiplied, not divided; what a sublayer adds is normalised if the config does not say otherwise."""
    post = _norm(c) if c.get("use_post_norm", True) else None
    block = replace(
        _block(c, scale=c.attention_multiplier or head_dim(c) ** -0.5),
        attn_post_norm=post,
        mlp_post_norm=post,
    )
    scales = _scales(c)
    renames = ((r"\.post_norm1\.", ".attn_post_norm."), (r"\.post_norm2\.", ".mlp_post_norm."))
    spec = decoder(c, block, _norm(c), **scales | {"logit_scale": 1 / scales["logit_scale"]})
    return spec, Names(renames=(*LLAMA, *renames))


def _norm(c: HF) -> Norm:
    return Norm(eps=c.number("rms_norm_eps"))


def _attention(c: HF, **changes: Any) -> Attention:
    changes = {"scale": c.number("attention_multiplier"), **changes}
    return attention(c, num_kv_heads=kv_heads(c), **biases(c), **changes)


def _block(c: HF, **changes: Any) -> Block:
    attn = attention(c, num_kv_heads=kv_heads(c), **biases(c), **changes)
    feed_forward = mlp(c, bias=bool(c.mlp_bias))
    return pre_norm(attn, feed_forward, _norm(c), residual_scale=c.number("residual_multiplier"))


def _scales(c: HF) -> dict[str, float]:
    return {"embed_scale": c.number("embedding_multiplier"), "logit_scale": 1 / c.number("logits_scaling")}


def granite_moe(c: HF) -> tuple[Decoder, Names]:
    c.refuse_if_set("mlp_bias")
    return _with_experts(c, granite(c)[0])


def granite_moe_swa(c: HF) -> tuple[Decoder, Names]:
    c.refuse_if_set("mlp_bias")
    return _with_experts(c, replace(granite_swa(c)[0], tied=bool(c.tie_word_embeddings)))


def _with_experts(c: HF, dense: Decoder) -> tuple[Decoder, Names]:
    """Their softmax over the chosen experts is one over all, renormalised. A layer's experts are two tensors."""
    hidden, shared = c.count("intermediate_size"), c.get("shared_intermediate_size", 0)
    moe = MoE(
        num_experts=c.count("num_local_experts"),
        top_k=c.count("num_experts_per_tok"),
        expert=mlp(c),
        shared=mlp(c, hidden=shared) if shared else None,
    )
    renames = (
        *LLAMA,
        (r"\.block_sparse_moe\.router\.(layer\.)?", ".mlp.gate."),
        (r"\.block_sparse_moe\.experts\.", ".mlp.experts."),
        (r"\.block_sparse_moe\.input_linear\.weight$", ".mlp.experts.gate_up_proj"),
        (r"\.block_sparse_moe\.output_linear\.weight$", ".mlp.experts.down_proj"),
        (r"\.shared_mlp\.output_linear\.", ".mlp.shared.down_proj."),
        (r"\.shared_mlp\.", ".mlp.shared."),
    )
    splits = {"gate_up_proj": Split({"gate_proj": hidden, "up_proj": hidden})}
    if shared:
        splits["input_linear"] = Split({"gate_proj": shared, "up_proj": shared})
    blocks = tuple(replace(block, mlp=moe) for block in dense.blocks)
    return replace(dense, blocks=blocks), Names(renames=renames, splits=splits, stacked=STACKED)


def granite_moe_hybrid(c: HF) -> tuple[Decoder, Names]:
    """State spaces, or attention that knows no positions unless the config says so; with experts or without."""
    kind = c.get("normalization_function", "rmsnorm")
    c.refuse(kind != "rmsnorm", f"normalization_function={kind!r}")
    width = c.count("shared_intermediate_size")
    if c.num_local_experts == 0:
        c.skip("num_experts_per_tok", "intermediate_size")
        one = pre_norm(
            _attention(c), mlp(c, hidden=width), _norm(c), residual_scale=c.number("residual_multiplier")
        )
        spec = decoder(c, one, _norm(c), **_scales(c))
        splits = {"input_linear": Split({"gate_proj": width, "up_proj": width})}
        names = Names(renames=(*LLAMA, *PLAIN_MLP), splits=splits)
    else:
        spec, names = granite_moe(c)
    kinds = c.layer_types or c.layers_block_type or ["mamba"] * len(spec.blocks)
    whole, scan = _attention(c, **_positions(c)), scanning(c, _norm(c))
    attends = is_attention(c, kinds)
    if len(attends) != len(spec.blocks):
        raise ModelError(f"config.json: layer_types has {len(kinds)} entries for {len(spec.blocks)} layers")
    blocks = zip(spec.blocks, attends, strict=True)
    spec = replace(spec, blocks=tuple(replace(b, mixer=whole if at else scan) for b, at in blocks))
    return spec, replace(names, renames=(*names.renames, (r"\.mamba\.", ".mixer.")))


def _positions(c: HF) -> dict[str, None]:
    """What makes attention blind for positions, unless the config asks for rotary embedding."""
    kind = c.position_embedding_type
    c.refuse(kind not in (None, "nope", "rope"), f"position_embedding_type={kind!r}")
    return {} if kind == "rope" else {"rope": None}
