"""Liquid's hybrids: attention in some layers, short convolutions in the others."""

from collections.abc import Callable
from dataclasses import replace

from quire.models.common import attention, decoder, layer_types, pre_norm, rope
from quire.models.hf import HF
from quire.models.names import Names
from quire.models.spec import MLP, Block, Decoder, MoE, Norm, ShortConv

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


def _lfm2(c: HF, feed_forward: Callable[[int], MLP | MoE]) -> Decoder:
    norm = Norm(eps=c.get("norm_eps", 1e-5))
    local = ShortConv(width=c.get("conv_L_cache", 3), bias=bool(c.conv_bias))
    is_conv = layer_types(c, lambda i: c.full_attn_idxs is not None and i not in c.full_attn_idxs, "conv")
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
