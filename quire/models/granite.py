"""Granite 3: Llama with a multiplier at each end of each part; and its mixtures of experts."""

from dataclasses import replace

from quire.models.common import attention, biases, decoder, kv_heads, mlp, pre_norm
from quire.models.hf import HF
from quire.models.names import LLAMA, STACKED, Names, Split
from quire.models.spec import Decoder, MoE, Norm


def granite(c: HF) -> tuple[Decoder, Names]:
    norm = Norm(eps=c.number("rms_norm_eps"))
    attn = attention(c, num_kv_heads=kv_heads(c), scale=c.number("attention_multiplier"), **biases(c))
    block = pre_norm(
        attn, mlp(c, bias=bool(c.mlp_bias)), norm, residual_scale=c.number("residual_multiplier")
    )
    scales = {"embed_scale": c.number("embedding_multiplier"), "logit_scale": 1 / c.number("logits_scaling")}
    return decoder(c, block, norm, **scales), Names(renames=LLAMA)


def granite_moe(c: HF) -> tuple[Decoder, Names]:
    """Its softmax over the chosen experts is one over all, renormalised. A layer's experts are two tensors."""
    c.refuse_if_set("mlp_bias")
    dense, _ = granite(c)
    hidden, shared = c.count("intermediate_size"), c.get("shared_intermediate_size", 0)
    moe = MoE(
        num_experts=c.count("num_local_experts"),
        top_k=c.count("num_experts_per_tok"),
        expert=mlp(c),
        shared=mlp(c, hidden=shared) if shared else None,
    )
    renames = (
        *LLAMA,
        (r"\.block_sparse_moe\.router\.layer\.", ".mlp.gate."),
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
