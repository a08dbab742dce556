"""Trinity (AFMoE) and Laguna: gates on what attention found, sigmoid scores with a correction, shared experts."""

from quire.models.common import (
    attention,
    biases,
    decoder,
    kv_heads,
    layer_types,
    mlp,
    rope,
    sandwich,
    shared_experts,
)
from quire.models.deepseek import RENAMES, dense_layers, mostly_experts
from quire.models.hf import HF
from quire.models.names import SANDWICH, Names
from quire.models.spec import Attention, Block, Decoder, MoE, Norm


def afmoe(c: HF) -> tuple[Decoder, Names]:
    """Norms around each sublayer; only local layers have a rotary embedding."""
    for key, known in (("score_func", "sigmoid"), ("route_norm", True), ("n_group", 1), ("topk_group", 1)):
        c.refuse((value := c.get(key, known)) != known, f"{key}={value!r}")
    every = c.get("global_attn_every_n_layers", 4)
    local = layer_types(c, lambda i: (i + 1) % every != 0)
    norm, size, first = Norm(eps=c.number("rms_norm_eps")), c.count("head_dim"), c.get("num_dense_layers", 1)
    rotary, sliding = rope(c, size), c.get("sliding_window", 1024) or None
    moe = MoE(
        num_experts=c.count("num_experts", "num_local_experts"),
        top_k=c.count("num_experts_per_tok"),
        expert=mlp(c, hidden=c.count("moe_intermediate_size")),
        score="sigmoid",
        scale=c.number("route_scale"),
        correction=True,
        shared=shared_experts(c, "num_shared_experts"),
    )

    def block(i: int) -> Block:
        here = {"rope": rotary, "window": sliding} if local[i] else {"rope": None}
        own = {"num_kv_heads": kv_heads(c), "qk_norm": norm, "gate": "sigmoid", **biases(c)}
        return sandwich(attention(c, head_dim=size, **here, **own), mlp(c) if i < first else moe, norm)

    scale = c.count("hidden_size") ** 0.5 if c.mup_enabled else 1.0
    renames = (
        (r"\.pre_mlp_layernorm\.", ".mlp_norm."),
        (r"\.post_mlp_layernorm\.", ".mlp_post_norm."),
        (r"\.router\.gate\.", ".gate."),
        (r"\.mlp\.expert_bias$", ".mlp.gate.e_score_correction_bias"),
        (r"\.shared_experts\.", ".shared."),
        *SANDWICH,
    )
    return decoder(c, block, norm, embed_scale=scale), Names(renames=renames)


def laguna(c: HF) -> tuple[Decoder, Names]:
    """Layers differ in their number of heads; local ones rotate whole heads, others half of each."""
    c.refuse_if_set("moe_apply_router_weight_on_input", "moe_router_logit_softcapping")
    per_head = c.get("gating", True)
    c.refuse(per_head not in (True, "per-head", "per-element"), f"gating={per_head!r}")
    norm, size = Norm(eps=c.number("rms_norm_eps")), c.count("head_dim")
    local, heads = layer_types(c, lambda i: False), c.num_attention_heads_per_layer
    sliding = c.get("sliding_window", 512)
    moe = MoE(
        num_experts=c.count("num_experts", "num_local_experts"),
        top_k=c.count("num_experts_per_tok"),
        expert=mlp(c, hidden=c.count("moe_intermediate_size")),
        score="sigmoid",
        scale=c.get("moe_routed_scaling_factor", 1.0),
        correction=True,
        shared=mlp(c, hidden=c.count("shared_expert_intermediate_size")),
    )
    usual = (1.0, 10_000.0) if c.rope_parameters else (0.5, 500_000.0)

    def mixer(i: int) -> Attention:
        partial, theta = (1.0, 10_000.0) if local[i] else usual
        rotary = rope(c, size, local=local[i], partial=partial, theta=theta)
        own = {"num_heads": heads[i]} if heads else {}
        return attention(
            c,
            head_dim=size,
            rope=rotary,
            window=sliding if local[i] else None,
            qk_norm=norm,
            gate="softplus",
            gate_per_head=per_head != "per-element",
            **own,
            **biases(c),
        )

    renames = (
        (r"\.g_proj\.", ".gate_proj."),
        (r"\.experts\.e_score_correction_bias$", ".gate.e_score_correction_bias"),
        (r"\.shared_expert\.", ".shared."),
        *RENAMES,
    )
    return mostly_experts(c, mixer, moe, dense_layers(c)), Names(renames=renames)
