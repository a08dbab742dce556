"""Ling and Ring of inclusionAI, which call themselves Bailing, as they were published; kimi.py has the hybrid."""

from dataclasses import replace

from quire.models.common import attention, head_dim, mlp, rope, rope_parameters, shared_experts
from quire.models.deepseek import RENAMES as PLAIN
from quire.models.deepseek import first_dense, grouped_experts, mostly_experts, mtp_layers
from quire.models.hf import HF
from quire.models.names import Names, Split
from quire.models.spec import Decoder, MoE, Norm

RENAMES = (
    (r"\.word_embeddings\.", ".embed_tokens."),
    (r"\.attention\.", ".self_attn."),
    (r"\.self_attn\.dense\.", ".self_attn.o_proj."),
    (r"\.query_layernorm\.", ".q_norm."),
    (r"\.key_layernorm\.", ".k_norm."),
    (r"\.expert_bias$", ".e_score_correction_bias"),
    *PLAIN,
)


def bailing_moe(c: HF) -> tuple[Decoder, Names]:
    """Ling 1 and 1.5: usual attention, softmax scores."""
    moe = MoE(
        num_experts=c.count("num_experts"),
        top_k=c.count("num_experts_per_tok"),
        expert=mlp(c, hidden=c.count("moe_intermediate_size")),
        renorm=bool(c.need("norm_topk_prob")),
        shared=shared_experts(c, "num_shared_experts"),
    )
    return _described(c, moe)


def bailing_moe_v2(c: HF) -> tuple[Decoder, Names]:
    """Ling and Ring 2: queries and keys are normalised and rotated in part; DeepSeek V3's routing."""
    c.refuse((kind := c.get("score_function", "sigmoid")) != "sigmoid", f"score_function={kind!r}")
    c.refuse(not c.moe_router_enable_expert_bias, "no moe_router_enable_expert_bias")
    if rope_parameters(c).get("partial_rotary_factor") is None:
        c.number("partial_rotary_factor")
    moe = replace(grouped_experts(c, "num_shared_experts"), num_experts=c.count("num_experts"))
    return _described(c, moe, partial=1.0)


def _described(c: HF, moe: MoE, partial: float | None = None) -> tuple[Decoder, Names]:
    norm, rotary = Norm(eps=c.number("rms_norm_eps")), rope(c, head_dim(c), partial=partial)
    qk_norm = norm if c.use_qk_norm else None
    bias, out_bias = bool(c.use_qkv_bias), bool(c.use_bias)
    mixer = attention(c, rope=rotary, qk_norm=qk_norm, bias=bias, out_bias=out_bias)
    c.refuse_if_set("norm_head", "multi_gate", "use_sliding_window")
    c.refuse(not c.get("use_rmsnorm", True), "use_rmsnorm=false")
    c.skip("sliding_window", "rotary_dim", "router_dtype", "norm_softmax", "mtp_loss_scaling_factor")
    wide = c.get("moe_shared_expert_intermediate_size")
    c.refuse(wide not in (None, moe.expert.hidden), f"moe_shared_expert_intermediate_size={wide}")
    q, kv = (n * mixer.head_dim for n in (mixer.num_heads, mixer.num_kv_heads))
    splits = {"query_key_value": Split({"q_proj": q, "k_proj": kv, "v_proj": kv})}
    spec = mostly_experts(c, mixer, moe, first_dense(c))
    return spec, Names(renames=RENAMES, splits=splits, ignored=mtp_layers(c))
