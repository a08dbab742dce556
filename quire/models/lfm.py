"""Liquid's hybrids: attention in some layers, short convolutions in the others."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from quire.models.common import attention, biases, decoder, layer_types, pre_norm, rope, tied_by_default
from quire.models.hf import HF
from quire.models.names import Names
from quire.models.spec import MLP, Block, Decoder, Mixer, MoE, Norm, Rope, ShortConv

THETA = 1_000_000.0
NAMES = Names(
    renames=(
        (r"^model\.", ""),
        (r"^embedding_norm\.", "norm."),
        (r"\.operator_norm\.", ".attn_norm."),
        (r"\.ffn_norm\.", ".mlp_norm."),
        (r"\.self_attn\.out_proj\.", ".mixer.o_proj."),
        (r"\.self_attn\.([qk])_layernorm\.", r".mixer.\1_norm."),
        (r"\.(self_attn|conv)\.(?!weight|bias)", ".mixer."),
        (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
        (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
        (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
    )
)


MOE = replace(
    NAMES,
    renames=(
        *NAMES.renames,
        (r"\.feed_forward\.", ".mlp."),
        (r"\.w1\.", ".gate_proj."),
        (r"\.w3\.", ".up_proj."),
        (r"\.w2\.", ".down_proj."),
        (r"\.expert_bias$", ".gate.e_score_correction_bias"),
    ),
)


LFM3 = replace(
    NAMES,
    renames=(
        (r"\.self_attn\.([qk])_norm\.", r".mixer.\1_norm."),
        (r"\.self_attn\.o_proj\.", ".mixer.o_proj."),
        (r"\.post_operator_norm\.", ".attn_post_norm."),
        (r"\.post_ffn_norm\.", ".mlp_post_norm."),
        *NAMES.renames,
    ),
)
LFM3_ROPES: Mapping[str, Mapping[str, Any]] = {
    "sliding_attention": {"theta": 10_000.0},
    "full_attention": {
        "theta": 1_000_000.0,
        "scaling": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    },
}


def lfm2(c: HF) -> tuple[Decoder, Names]:
    feed_forward = MLP(hidden=_hidden(c))
    return _lfm2(c, lambda _: feed_forward), NAMES


def lfm2_moe(c: HF) -> tuple[Decoder, Names]:
    """Sigmoid scores; all layers but the first have experts."""
    dense, first = MLP(hidden=c.count("intermediate_size")), c.get("num_dense_layers", 2)
    moe = MoE(
        num_experts=c.count("num_experts"),
        top_k=c.count("num_experts_per_tok"),
        expert=MLP(hidden=c.count("moe_intermediate_size")),
        score="sigmoid",
        renorm=bool(c.get("norm_topk_prob", True)),
        scale=c.get("routed_scaling_factor", 1.0),
        correction=bool(c.get("use_expert_bias", True)),
    )
    return _lfm2(c, lambda i: dense if i < first else moe), MOE


def lfm3(c: HF) -> tuple[Decoder, Names]:
    """Norms before and after; attention, some of it local, has a gate for each head."""
    norm, feed_forward = Norm(eps=c.get("norm_eps", 1e-5)), MLP(hidden=c.count("intermediate_size"))
    post = norm if c.get("use_sandwich_norm", True) else None
    conv = ShortConv(width=c.get("conv_L_cache", 7), bias=bool(c.conv_bias))
    kinds = c.layer_types or [_lfm3_kind(i) for i in range(c.count("num_hidden_layers"))]
    unknown = sorted(set(map(str, kinds)) - {"conv", *LFM3_ROPES})
    c.refuse(bool(unknown), f"layer_types entry {', '.join(unknown)}")

    def mixer(kind: str) -> Mixer:
        if kind == "conv":
            return conv
        size, local = c.get("head_dim", 128), kind == "sliding_attention"
        return attention(
            c,
            head_dim=size,
            rope=rope(c, size, local=local) if c.rope_parameters else Rope(dim=size, **LFM3_ROPES[kind]),
            window=c.get("sliding_window", 256) if local else None,
            qk_norm=norm,
            gate="sigmoid" if c.get("use_attention_gate", True) else None,
            gate_per_head=True,
            **biases(c),
        )

    def block(i: int) -> Block:
        return pre_norm(mixer(kinds[i]), feed_forward, norm, attn_post_norm=post, mlp_post_norm=post)

    return decoder(c, block, norm, tied=tied_by_default(c)), LFM3


def _lfm3_kind(layer: int) -> str:
    if layer % 4 == 2:
        return "full_attention"
    return "sliding_attention" if layer and layer % 4 == 0 else "conv"


def _lfm2(c: HF, feed_forward: Callable[[int], MLP | MoE]) -> Decoder:
    norm = Norm(eps=c.get("norm_eps", 1e-5))
    local = ShortConv(width=c.get("conv_L_cache", 3), bias=bool(c.conv_bias))
    whole_at = c.full_attn_idxs
    is_conv = layer_types(c, lambda i: whole_at is not None and i not in whole_at, "conv")
    whole = attention(c, rope=rope(c, _head_dim(c), theta=THETA), head_dim=_head_dim(c), qk_norm=norm)

    def block(layer: int) -> Block:
        return pre_norm(local if is_conv[layer] else whole, feed_forward(layer), norm)

    tied = bool(c.get("tie_embedding", c.get("tie_word_embeddings", True)))
    return decoder(c, block, norm, tied=tied)


def _head_dim(c: HF) -> int:
    return c.head_dim or c.count("hidden_size") // c.count("num_attention_heads")


def _hidden(c: HF) -> int:
    """Published configs give the size of an ungated layer, of which a gated one takes two thirds."""
    size = c.count("block_ff_dim", "intermediate_size")
    factor, multiple = c.get("block_ffn_dim_multiplier", 1.0), c.get("block_multiple_of", 256)
    if not c.get("block_auto_adjust_ff_dim", True):
        return size
    size = int(2 * size / 3)
    return size if factor is None else -(-int(factor * size) // multiple) * multiple
