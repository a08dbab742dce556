"""OLMo 1, 2, 3, Hybrid, OLMoE, FlexOlmo; EXAONE 4, whose norms follow sublayers as OLMo 2's do; K-EXAONE, Kolibri."""

from collections.abc import Callable

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
    sandwich,
    window,
)
from quire.models.deepseek import RENAMES, dense_layers, grouped_experts, mostly_experts
from quire.models.hf import HF
from quire.models.names import CORRECTION, LLAMA, Names
from quire.models.spec import Attention, Block, Decoder, DeltaNet, MoE, Norm

DELTA_EPS = 1e-5  # the norms of DeltaNets do not follow rms_norm_eps

POST_NORM = (
    (r"^model\.", ""),
    (r"\.self_attn\.", ".mixer."),
    (r"\.post_attention_layernorm\.", ".attn_post_norm."),
    (r"\.post_feedforward_layernorm\.", ".mlp_post_norm."),
)


def olmo(c: HF) -> tuple[Decoder, Names]:
    """Layer norms without parameters."""
    norm = Norm(kind="layer", eps=1e-5, weight=False)
    attn = attention(c, num_kv_heads=kv_heads(c), clip=c.clip_qkv, **biases(c))
    return decoder(c, pre_norm(attn, mlp(c), norm), norm), Names(renames=LLAMA)


def olmo2(c: HF) -> tuple[Decoder, Names]:
    norm = Norm(eps=c.number("rms_norm_eps"))
    attn = attention(c, qk_norm=norm, qk_norm_span="full", num_kv_heads=kv_heads(c), **biases(c))
    return decoder(c, _post_norm(c, attn, norm), norm), Names(renames=POST_NORM)


def olmo3(c: HF) -> tuple[Decoder, Names]:
    """Three of four layers are local; only the others' rotary embedding is stretched."""
    norm = Norm(eps=c.number("rms_norm_eps"))
    local = layer_types(c, lambda i: (i + 1) % 4 != 0)

    def block(i: int) -> Block:
        rotary = rope(c, head_dim(c), local=local[i], theta=500_000.0)
        own = {"qk_norm": norm, "qk_norm_span": "full", "num_kv_heads": kv_heads(c), **biases(c)}
        return _post_norm(c, attention(c, rope=rotary, window=window(c, local[i]), **own), norm)

    return decoder(c, block, norm), Names(renames=POST_NORM)


def olmo_hybrid(c: HF) -> tuple[Decoder, Names]:
    """OLMo 3's attention, perhaps without positions, in some layers; DeltaNets behind norms in the others."""
    c.refuse((act := c.text("hidden_act")) != "silu", f"hidden_act={act!r}")
    c.skip(*(f"linear_{key}" for key in ("a_log_min", "a_log_max", "dt_min", "dt_max", "dt_init_floor")))
    norm, heads = Norm(eps=c.number("rms_norm_eps")), c.count("num_attention_heads")
    key_heads = c.linear_num_key_heads or heads
    k_dim = c.linear_key_head_dim or int(0.75 * c.count("hidden_size") / key_heads)
    delta = DeltaNet(
        num_k_heads=key_heads,
        num_v_heads=c.linear_num_value_heads or heads,
        k_dim=k_dim,
        v_dim=c.linear_value_head_dim or 2 * k_dim,
        width=c.get("linear_conv_kernel_dim", 4),
        norm=Norm(eps=DELTA_EPS),
        beta_scale=2.0 if c.get("linear_allow_neg_eigval", True) else 1.0,
    )
    found = c.rope_parameters or {"rope_theta": c.get("rope_theta", 1.0)}
    rotary = None if found.get("rope_theta", 1.0) is None else rope(c, head_dim(c))
    own = {"qk_norm": norm, "qk_norm_span": "full", "num_kv_heads": kv_heads(c), **biases(c)}
    whole = _post_norm(c, attention(c, rope=rotary, **own), norm)
    last = c.count("num_hidden_layers") - 1
    is_delta = layer_types(c, lambda i: i % 4 != 3 and (i < last or last > 2), "linear_attention")

    def block(i: int) -> Block:
        return pre_norm(delta, mlp(c), norm) if is_delta[i] else whole

    layers = "|".join(str(i) for i, does in enumerate(is_delta) if does)
    renames = (
        (r"\.attention_layer_norm\.", ".input_layernorm."),
        (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
        (r"\.linear_attn\.", ".mixer."),
        (rf"(\.({layers}))\.input_layernorm\.", r"\1.attn_norm."),
        (rf"(\.({layers}))\.post_attention_layernorm\.", r"\1.mlp_norm."),
        *POST_NORM,
    )
    return decoder(c, block, norm), Names(renames=renames)


def exaone4(c: HF) -> tuple[Decoder, Names]:
    norm, mixer = Norm(eps=c.number("rms_norm_eps")), _exaone_attention(c)
    return decoder(c, lambda i: _post_norm(c, mixer(i), norm), norm), Names(renames=POST_NORM)


def exaone_moe(c: HF) -> tuple[Decoder, Names]:
    """EXAONE 4's attention, but norms before the sublayers, and DeepSeek V3's experts."""
    moe = grouped_experts(c, shared="num_shared_experts")
    spec = mostly_experts(c, _exaone_attention(c), moe, dense_layers(c))
    return spec, Names(renames=(*RENAMES, CORRECTION), ignored=(r"^mtp\.",))


def kolibri1(c: HF) -> tuple[Decoder, Names]:
    """EXAONE 4's attention with norms around each sublayer; a correction of logits, not scores, picks the experts."""
    c.count("head_dim")
    c.skip("intermediate_size")  # of layers without experts
    norm, mixer = Norm(eps=c.number("rms_norm_eps")), _exaone_attention(c, size=513, every=5)
    moe = MoE(
        num_experts=c.count("num_experts", "num_local_experts"),
        top_k=c.count("num_experts_per_tok"),
        expert=mlp(c, hidden=c.count("moe_intermediate_size")),
        score="sigmoid_topk",
        renorm=bool(c.norm_topk_prob),
        correction=True,
        shared=mlp(c, hidden=c.count("shared_expert_intermediate_size")),
    )

    def block(i: int) -> Block:
        return sandwich(mixer(i), moe, norm)

    renames = (
        (r"\.(post_self_attn_layernorm|post_attn_norm)\.", ".attn_post_norm."),
        (r"\.(post_mlp_layernorm|post_ffn_norm)\.", ".mlp_post_norm."),
        (r"\.(moe|mlp)\.router\.expert_bias$", ".mlp.gate.e_score_correction_bias"),
        *RENAMES,
    )
    return decoder(c, block, norm), Names(renames=renames)


def _exaone_attention(c: HF, size: int = 4096, every: int = 4) -> Callable[[int], Attention]:
    """Where some layers are local, the others have no rotary embedding. `size` of windows, if the config has none."""
    norm, sliding = Norm(eps=c.number("rms_norm_eps")), c.get("sliding_window", size) or None
    pattern = c.get("sliding_window_pattern", every)
    unclear = not c.layer_types and not isinstance(pattern, int)
    c.refuse(unclear, f"sliding_window_pattern={pattern!r} without layer_types")
    local = layer_types(c, lambda i: sliding is not None and (i + 1) % pattern != 0)
    rotary = rope(c, head_dim(c))

    def mixer(i: int) -> Attention:
        here = rotary if local[i] or sliding is None else None
        return attention(c, rope=here, window=sliding if local[i] else None, qk_norm=norm)

    return mixer


def olmoe(c: HF) -> tuple[Decoder, Names]:
    """Every layer has experts of intermediate_size; q and k are normalised over all heads together."""
    norm = Norm(eps=c.number("rms_norm_eps"))
    own = {
        "qk_norm": norm,
        "qk_norm_span": "full",
        "clip": c.clip_qkv,
        "num_kv_heads": kv_heads(c),
        **biases(c),
    }
    attn = attention(c, **own)
    return decoder(c, pre_norm(attn, _experts(c), norm), norm), Names(renames=LLAMA)


def flex_olmo(c: HF) -> tuple[Decoder, Names]:
    """OLMo 2 with OLMoE's experts (Shi et al. 2025)."""
    norm = Norm(eps=c.number("rms_norm_eps"))
    rotary = rope(c, head_dim(c), theta=500_000.0)
    own = {"qk_norm": norm, "qk_norm_span": "full", "num_kv_heads": kv_heads(c), **biases(c)}
    block = _post_norm(c, attention(c, rope=rotary, **own), norm, _experts(c))
    return decoder(c, block, norm), Names(renames=POST_NORM)


def _experts(c: HF) -> MoE:
    return MoE(
        num_experts=c.count("num_experts", "num_local_experts"),
        top_k=c.count("num_experts_per_tok"),
        expert=mlp(c),
        renorm=bool(c.norm_topk_prob),
    )


def _post_norm(c: HF, mixer: Attention, norm: Norm, moe: MoE | None = None) -> Block:
    return Block(
        mixer=mixer,
        mlp=moe or mlp(c),
        attn_norm=None,
        mlp_norm=None,
        attn_post_norm=norm,
        mlp_post_norm=norm,
    )
