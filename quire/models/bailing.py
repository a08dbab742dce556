"""Ling, Ring and Ring-linear of inclusionAI, called Bailing, as they were published; kimi.py has the hybrid."""

from dataclasses import replace

from quire.models.common import attention, head_dim, mlp, rope, rope_parameters, shared_experts
from quire.models.deepseek import RENAMES as PLAIN
from quire.models.deepseek import first_dense, grouped_experts, mostly_experts, mtp_layers
from quire.models.hf import HF
from quire.models.names import Names, Split
from quire.models.spec import Block, Decoder, Lightning, MoE, Norm

RENAMES = (
    (r"\.word_embeddings\.", ".embed_tokens."),
    (r"\.attention\.", ".self_attn."),
    (r"\.self_attn\.dense\.", ".self_attn.o_proj."),
    (r"\.query_layernorm\.", ".q_norm."),
    (r"\.key_layernorm\.", ".k_norm."),
    (r"\.g_norm\.", ".o_norm."),
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
    return _described(c, _routed(c), partial=1.0)


def bailing_moe_linear_v2(c: HF) -> tuple[Decoder, Names]:
    """Ring-linear: Ring 2 with lightning attention in all but the last of each group of layers."""
    c.refuse_if_set("use_qkv_bias", "use_bias", "linear_silu", "use_linear_silu")
    c.refuse(not c.use_qk_norm, "use_qk_norm=false")
    c.refuse(not c.get("linear_rope", True), "linear_rope=false")
    heads, size, num_layers = c.count("num_attention_heads"), head_dim(c), c.count("num_hidden_layers")
    c.refuse(heads & (heads - 1) != 0, f"num_attention_heads={heads}, which is no power of two,")
    c.refuse(num_layers == 1, "num_hidden_layers=1")
    c.skip("linear_backend")  # that others compute it with
    period, groups = c.count("layer_group_size"), c.count("group_norm_size")
    c.refuse(heads * size % groups != 0, f"group_norm_size={groups} of {heads * size} dimensions")
    spec, names = _described(c, _routed(c), partial=1.0)
    linear = [i for i in range(num_layers // period * period) if (i + 1) % period]
    norm, rotary = spec.norm, rope(c, size, partial=1.0)

    def block(i: int) -> Block:
        if i not in linear:
            return spec.blocks[i]
        mixer = Lightning(
            num_heads=heads,
            head_dim=size,
            rate=1 - (i - 1) / (num_layers - 1) + 1e-5,
            norm=norm,
            groups=groups,
            activated=False,
            qk_norm=norm,
            rope=rotary,
            scale=size**-0.5,
        )
        return replace(spec.blocks[i], mixer=mixer)

    layers, rows = "|".join(map(str, linear)), heads * size
    apart = (rf"^(layers\.(?:{layers})\.mixer)\.query_key_value\.", r"\1.qkv_proj.")
    splits = {**names.splits, "qkv_proj": Split({"q_proj": rows, "k_proj": rows, "v_proj": rows})}
    blocks = tuple(map(block, range(num_layers)))
    return replace(spec, blocks=blocks), replace(names, renames=(*RENAMES, apart), splits=splits)


def _routed(c: HF) -> MoE:
    c.refuse((kind := c.get("score_function", "sigmoid")) != "sigmoid", f"score_function={kind!r}")
    c.refuse(not c.moe_router_enable_expert_bias, "no moe_router_enable_expert_bias")
    if rope_parameters(c).get("partial_rotary_factor") is None:
        c.number("partial_rotary_factor")
    return replace(grouped_experts(c, "num_shared_experts"), num_experts=c.count("num_experts"))


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
