"""Step-3: one head of keys and values, to which queries come through few numbers (StepFun 2025). Step-3.5 (2026)."""

from collections.abc import Sequence
from dataclasses import replace

from quire.errors import ModelError
from quire.models.common import (
    attention,
    biases,
    decoder,
    layer_kinds,
    layer_types,
    mlp,
    pre_norm,
    rope,
    stretched,
)
from quire.models.hf import HF
from quire.models.names import LLAMA, Names, Split
from quire.models.spec import MLP, Attention, Block, Decoder, MoE, Norm, Rope

RENAMES = (
    *LLAMA,
    (r"\.mixer\.q_proj\.", ".mixer.q_a_proj."),
    (r"\.inter_norm\.", ".q_a_layernorm."),
    (r"\.wq\.", ".q_b_proj."),
    (r"\.share_expert\.", ".mlp.shared."),
    (r"\.moe\.gate\.", ".mlp.gate."),
    (r"\.moe\.", ".mlp.experts."),
)
RENAMES_3P5 = (
    *LLAMA,
    (r"\.mixer\.g_proj\.", ".mixer.gate_proj."),
    (r"\.share_expert\.", ".mlp.shared."),
    (r"\.shared_experts\.", ".shared."),
    (r"\.moe\.router_bias$", ".mlp.gate.e_score_correction_bias"),
    (r"\.moe\.gate\.", ".mlp.gate."),
    (r"\.moe\.", ".mlp.experts."),
)
STACKED = ((r"\.experts\.(\w+_proj)\.weight$", r".experts.{}.\1.weight"),)
VISION = (r"^(vision_model|vit_\w+)\.",)


def step3(c: HF) -> tuple[Decoder, Names]:
    """Of a model that also sees images, the part that reads text."""
    c.refuse((groups := c.get("num_attention_groups", 1)) != 1, f"num_attention_groups={groups}")
    c.skip("max_seq_len", "moe_every_n_layer", "use_moe")  # of no effect in the published network
    c.skip("understand_projector_stride", "projector_bias", "vision_select_layer", "image_token_len")
    c.skip("use_im_start_end")
    norm, size, num_layers = (
        Norm(eps=c.number("rms_norm_eps")),
        c.count("head_dim"),
        c.count("num_hidden_layers"),
    )
    attn = attention(
        c,
        num_kv_heads=1,
        head_dim=size,
        rope=rope(c, size, theta=500_000.0),
        q_rank=c.count("share_q_dim"),
        q_rank_norm=norm,
    )
    dense = MLP(hidden=c.count("intermediate_size"))
    moe = MoE(
        num_experts=c.count("moe_num_experts"),
        top_k=c.count("moe_top_k"),
        expert=MLP(hidden=c.count("moe_intermediate_size")),
        renorm=bool(c.norm_expert_weight),
        shared=MLP(hidden=c.count("share_expert_dim")),
    )
    sparse = _layers(c, num_layers)

    def block(i: int) -> Block:
        return pre_norm(attn, moe if i in sparse else dense, norm)

    spec = decoder(c, block, norm, max_length=c.count("max_position_embedding", "max_position_embeddings"))
    return spec, Names(renames=RENAMES, stacked=STACKED, ignored=VISION)


def _layers(c: HF, num_layers: int) -> set[int]:
    """Those with experts: all but the first, or as the config lists them, as numbers or in one text."""
    listed = c.moe_layers_enum
    if listed is None:
        return set(range(1, num_layers))
    items = listed.split(",") if isinstance(listed, str) else listed
    if not isinstance(items, Sequence):
        raise ModelError(f"config.json: moe_layers_enum is {listed!r}; it must list layers")
    return {int(item) for item in items}


def step3p5(c: HF) -> tuple[Decoder, Names]:
    """Local layers with more heads, gates on what heads find, and limits of gates in the last layers.

    The keys of the authors' own code and of Transformers.
    """
    for key, known in (("moe_router_activation", "sigmoid"), ("att_impl_type", "GQA")):
        c.refuse((value := c.get(key, known)) != known, f"{key}={value!r}")
    for key in ("norm_expert_weight", "use_moe_router_bias", "use_head_wise_attn_gate", "zero_centered"):
        c.refuse(not c.get(key, True), f"{key}=false")
    c.refuse_if_set("sink")
    c.refuse(not all(c.use_rope_layers or ()), "use_rope_layers with layers without")
    c.skip("moe_every_n_layer", "moe_layer_offset", "use_moe", "max_seq_len", "need_fp32_gate", "use_qk_norm")
    c.skip("mtp_layer_types", "mtp_mlp_layer_types")  # of layers that predict further tokens
    norm = Norm(eps=c.number("rms_norm_eps"), offset=1.0)
    local, dense = layer_types(c, lambda i: False), _dense(c)

    def block(i: int) -> Block:
        feed_forward = _mlp(c, i, c.count("intermediate_size")) if dense[i] else _moe(c, i)
        rotary = _rope(c, local.index(local[i]), local[i], c.count("head_dim"))  # layers of a kind agree
        return pre_norm(_attention(c, i, local[i], norm, rotary), feed_forward, norm)

    hidden = c.count("moe_intermediate_size")
    splits = {"gate_up_proj": Split({"gate_proj": hidden, "up_proj": hidden})}
    stacked = ((r"\.experts\.(\w+_proj)(?:\.weight)?$", r".experts.{}.\1.weight"),)
    first, extra = c.count("num_hidden_layers"), c.get("num_nextn_predict_layers", 0)
    ignored = (*VISION, *(rf"^layers\.{first + i}\." for i in range(extra)))
    names = Names(renames=RENAMES_3P5, splits=splits, stacked=stacked, ignored=ignored)
    return decoder(c, block, norm), names


def _attention(c: HF, i: int, local: bool, norm: Norm, rotary: Rope) -> Attention:
    size, scalar = c.count("head_dim"), c.query_pre_attn_scalar
    return attention(
        c,
        num_heads=_num_heads(c, i, local),
        num_kv_heads=c.count("num_key_value_heads", "num_attention_groups"),
        head_dim=size,
        rope=rotary,
        scale=None if scalar in (None, size) else scalar**-0.5,
        qk_norm=norm,
        window=c.sliding_window if local else None,
        gate="sigmoid",
        gate_per_head=True,
        **biases(c),
    )


def _num_heads(c: HF, i: int, local: bool) -> int:
    """As stated for the layer, or for local ones."""
    other, usual = c.attention_other_setting or {}, c.count("num_attention_heads")
    for key, own in (("num_attention_groups", "num_key_value_heads"), ("head_dim", "head_dim")):
        same = other.get(key) in (None, c.get(own, c.get(key)))
        c.refuse(not same, f"attention_other_setting with another {key}")
    for local_heads in (c.num_sliding_attention_heads, other.get("num_attention_heads")):
        usual = local_heads if local and local_heads is not None else usual
    stated = (c.per_layer_config or {}).get(str(i), {})
    c.refuse(bool(stated.keys() - {"num_attention_heads"}), f"per_layer_config with {', '.join(stated)}")
    return int(stated.get("num_attention_heads", usual))


def _rope(c: HF, i: int, local: bool, size: int) -> Rope:
    """What stretches the context is for layers that are not local."""
    if c.rope_parameters:
        return rope(c, size, local=local, partial=1.0)
    theta, factors, found = c.get("rope_theta", 10_000.0), c.partial_rotary_factors, c.rope_scaling or {}
    types = c.yarn_only_types
    c.refuse(bool(found) and types not in (None, ["full_attention"]), f"yarn_only_types={types}")
    dim = int(size * (factors[i] if factors else 1.0))
    c.refuse(dim % 2 == 1, f"rotary embedding of an odd number of dimensions ({dim})")
    scaling, stretch = (None, 1.0) if local else stretched(c, found, dim)
    return Rope(dim=dim, theta=(theta[i] if isinstance(theta, list) else theta) * stretch, scaling=scaling)


def _dense(c: HF) -> list[bool]:
    """For each layer, whether it has no experts: as listed, or the first three."""
    if c.mlp_layer_types is not None:
        return layer_kinds(c, "mlp_layer_types", c.mlp_layer_types, "dense", "sparse")
    num_layers = c.count("num_hidden_layers")
    sparse = _layers(c, num_layers) if c.moe_layers_enum is not None else range(3, num_layers)
    return [i not in sparse for i in range(num_layers)]


def _mlp(c: HF, i: int, hidden: int, limits: str = "swiglu_limits_shared") -> MLP:
    """Limits that are 0 or null are none."""
    listed = c.get(limits)
    limit = float(listed[i]) if listed and listed[i] else None
    return mlp(c, hidden=hidden, act=c.get("hidden_act", "silu"), bias=bool(c.mlp_bias), limit=limit)


def _moe(c: HF, i: int) -> MoE:
    one = _mlp(c, i, c.count("moe_intermediate_size"), "swiglu_limits")
    return MoE(
        num_experts=c.count("n_routed_experts", "moe_num_experts"),
        top_k=c.count("num_experts_per_tok", "moe_top_k"),
        expert=replace(one, bias=False),
        score="sigmoid",
        scale=c.get("moe_router_scaling_factor", 1.0),
        correction=True,
        shared=_mlp(c, i, c.count("share_expert_dim", "share_expert_dims")),
    )
