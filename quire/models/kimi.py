"""Kimi Linear and Ling's hybrid: latent attention in some layers, Kimi delta attention in the others."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from quire.models.bailing import RENAMES as BAILING
from quire.models.common import decoder, layer_types, mlp, pre_norm, rope, rope_parameters, shared_experts
from quire.models.deepseek import LATENT_EPS, dense_layers, latent_attention, mtp_layers
from quire.models.hf import HF
from quire.models.mixtral import RENAMES
from quire.models.names import Names
from quire.models.spec import MLA, Block, Decoder, KimiDelta, MoE, Norm


def kimi_linear(c: HF) -> tuple[Decoder, Names]:
    """Latent attention has no positions."""
    c.refuse(not c.get("mla_use_nope", True), "mla_use_nope=false")
    c.refuse((act := c.text("hidden_act")) != "silu", f"hidden_act={act!r}")
    norm, found = Norm(eps=c.number("rms_norm_eps")), c.linear_attn_config or {}
    size = found.get("head_dim") or c.get("linear_head_dim", 128)
    delta = KimiDelta(
        num_heads=found.get("num_heads") or c.get("linear_num_heads", 32),
        head_dim=size,
        width=found.get("short_conv_kernel_size") or c.get("linear_conv_kernel_dim", 4),
        norm=norm,
        rank=size,
    )
    whole = replace(latent_attention(c), rope=None)
    is_delta = layer_types(c, lambda i: _is_delta(found, i), "linear_attention")
    renames = (*RENAMES, (r"\.shared_experts\.", ".shared."))
    return _hybrid(c, delta, whole, is_delta, _experts(c)), Names(renames=renames)


def bailing_hybrid(c: HF) -> tuple[Decoder, Names]:
    """Rates and gates have one matrix; rates are bounded; latent attention has gates and positions."""
    c.refuse((act := c.text("hidden_act")) != "silu", f"hidden_act={act!r}")
    c.refuse_if_set("attention_bias", "q_lora_rank")
    c.refuse(bool(rope_parameters(c).get("mscale_all_dim")), "mscale_all_dim")
    c.skip("num_key_value_heads", "qk_head_dim", "head_dim", "short_conv_kernel_size")  # follow from others
    c.skip("mtp_loss_scaling_factor", "kda_lower_bound", "rope_theta")
    heads, turned = c.count("num_attention_heads"), c.count("qk_rope_head_dim")
    delta = KimiDelta(
        num_heads=c.linear_num_heads or heads,
        head_dim=c.linear_head_dim or c.get("head_dim", 128),
        width=c.linear_conv_kernel_dim or c.get("short_conv_kernel_size", 4),
        norm=Norm(eps=c.number("rms_norm_eps")),
        rank=None,
        floor=c.get("kda_lower_bound", -5.0) if c.get("kda_safe_gate", True) else None,
    )
    whole = MLA(
        num_heads=heads,
        q_rank=None,
        kv_rank=c.count("kv_lora_rank"),
        nope_dim=c.count("qk_nope_head_dim"),
        rope_dim=turned,
        v_dim=c.count("v_head_dim"),
        rope=rope(c, turned, theta=6_000_000.0, interleaved=True),
        norm=Norm(eps=LATENT_EPS),
        gate=True,
    )
    period = c.get("layer_group_size", 6)
    is_delta = layer_types(c, lambda i: (i + 1) % period != 0, "linear_attention")
    spec = _hybrid(c, delta, whole, is_delta, _experts(c, 8, 4))
    return spec, Names(renames=BAILING, ignored=mtp_layers(c))


def _hybrid(c: HF, delta: KimiDelta, whole: MLA, is_delta: Sequence[bool], moe: MoE) -> Decoder:
    norm, dense, is_dense = delta.norm, mlp(c), dense_layers(c)

    def block(i: int) -> Block:
        return pre_norm(delta if is_delta[i] else whole, dense if is_dense[i] else moe, norm)

    return decoder(c, block, norm, max_length=c.count("model_max_length", "max_position_embeddings"))


def _is_delta(found: Mapping[str, Any], layer: int) -> bool:
    """Configs that list the layers count them from one."""
    if (whole := found.get("full_attn_layers")) is not None:
        return layer + 1 not in whole
    return layer % 4 != 0 or layer == 0


def _experts(c: HF, groups: int = 1, top_groups: int = 1) -> MoE:
    """Two names are known for most keys; the numbers of groups are by default those given."""
    kind = c.get("moe_router_activation_func", "sigmoid")
    c.refuse(kind != "sigmoid", f"moe_router_activation_func={kind!r}")
    c.skip("use_grouped_topk")  # with one group, grouping changes nothing
    return MoE(
        num_experts=c.count("num_experts", "num_local_experts"),
        top_k=c.count("num_experts_per_token", "num_experts_per_tok"),
        expert=mlp(c, hidden=c.count("moe_intermediate_size")),
        score="sigmoid",
        renorm=bool(c.get("moe_renormalize", c.get("norm_topk_prob", True))),
        scale=c.number("routed_scaling_factor"),
        groups=c.get("num_expert_group", c.get("n_group", groups)),
        top_groups=c.get("topk_group", top_groups),
        correction=True,
        shared=shared_experts(c, "num_shared_experts" if c.n_shared_experts is None else "n_shared_experts"),
    )
