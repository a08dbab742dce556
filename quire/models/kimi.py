"""Kimi Linear: latent attention without positions in some layers, Kimi delta attention in the others."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quire.models.common import decoder, layer_types, mlp, pre_norm, shared_experts
from quire.models.deepseek import dense_layers, latent_attention
from quire.models.hf import HF
from quire.models.mixtral import RENAMES
from quire.models.names import Names
from quire.models.spec import Block, Decoder, KimiDelta, MoE, Norm


def kimi_linear(c: HF) -> tuple[Decoder, Names]:
    c.refuse(not c.get("mla_use_nope", True), "mla_use_nope=false")
    c.refuse((act := c.text("hidden_act")) != "silu", f"hidden_act={act!r}")
    norm, found = Norm(eps=c.number("rms_norm_eps")), c.linear_attn_config or {}
    delta = KimiDelta(
        num_heads=found.get("num_heads") or c.get("linear_num_heads", 32),
        head_dim=found.get("head_dim") or c.get("linear_head_dim", 128),
        width=found.get("short_conv_kernel_size") or c.get("linear_conv_kernel_dim", 4),
        norm=norm,
    )
    whole = replace(latent_attention(c), rope=None)
    is_delta = layer_types(c, lambda i: _is_delta(found, i), "linear_attention")
    moe, dense, is_dense = _experts(c), mlp(c), dense_layers(c)

    def block(i: int) -> Block:
        return pre_norm(delta if is_delta[i] else whole, dense if is_dense[i] else moe, norm)

    length = c.count("model_max_length", "max_position_embeddings")
    renames = (*RENAMES, (r"\.shared_experts\.", ".shared."))
    return decoder(c, block, norm, max_length=length), Names(renames=renames)


def _is_delta(found: Mapping[str, Any], layer: int) -> bool:
    """Configs that list the layers count them from one."""
    if (whole := found.get("full_attn_layers")) is not None:
        return layer + 1 not in whole
    return layer % 4 != 0 or layer == 0


def _experts(c: HF) -> MoE:
    kind = c.get("moe_router_activation_func", "sigmoid")
    c.refuse(kind != "sigmoid", f"moe_router_activation_func={kind!r}")
    c.skip("use_grouped_topk")  # with one group, grouping changes nothing
    return MoE(
        num_experts=c.count("num_experts", "num_local_experts"),
        top_k=c.count("num_experts_per_token", "num_experts_per_tok"),
        expert=mlp(c, hidden=c.count("moe_intermediate_size")),
        score="sigmoid",
        renorm=bool(c.get("moe_renormalize", True)),
        scale=c.number("routed_scaling_factor"),
        groups=c.get("num_expert_group", 1),
        top_groups=c.get("topk_group", 1),
        correction=True,
        shared=shared_experts(c, "num_shared_experts"),
    )
