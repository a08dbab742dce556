"""Mixtral: Mistral with experts in every layer; the MiniMaxes and Phi 3.5 MoE, which store their experts likewise."""

from collections.abc import Sequence
from dataclasses import replace

from quire.models.common import (
    attention,
    decoder,
    head_dim,
    layer_types,
    mlp,
    pre_norm,
    rope,
    rope_parameters,
)
from quire.models.hf import HF
from quire.models.names import CORRECTION, LLAMA, Names, Split
from quire.models.spec import Block, Decoder, Lightning, MoE, Norm, Rope

JITTER = 0.01  # that experts are weighed with

RENAMES = (
    *LLAMA,
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"\.w1\.", ".gate_proj."),
    (r"\.w3\.", ".up_proj."),
    (r"\.w2\.", ".down_proj."),
)


LIGHTNING_EPS = 1e-6  # the norms of lightning attention do not follow rms_norm_eps
DECAYS = r"\.mixer\.(slope_rate|(query|key|diagonal)_decay)$"  # saved along with weights, and known without


def mixtral(c: HF) -> tuple[Decoder, Names]:
    norm = Norm(eps=c.number("rms_norm_eps"))
    attn = attention(c, window=c.sliding_window, rope=rope(c, head_dim(c), theta=1_000_000.0))
    return decoder(c, pre_norm(attn, _experts(c), norm), norm), Names(renames=RENAMES)


def minimax(c: HF) -> tuple[Decoder, Names]:
    """Text-01 in Hugging Face's form."""
    usual = layer_types(c, lambda i: i % 2 == 1, "linear_attention")
    return _minimax(c, usual, "{}_alpha_factor", "{}_beta_factor", ("full_attn", "linear_attn", "mlp"), 1.0)


def minimax_text_01(c: HF) -> tuple[Decoder, Names]:
    """Text-01 and M1 as they were published."""
    c.refuse(not c.postnorm, "postnorm=false")
    c.refuse_if_set("shared_intermediate_size")
    parts = "full_attention", "linear_attention", "mlp"
    heads, partial = c.count("num_attention_heads"), (c.rotary_dim or head_dim(c)) / head_dim(c)
    c.refuse(heads & (heads - 1) != 0, f"num_attention_heads={heads}, which is no power of two,")
    is_linear = [kind == 0 for kind in c.need("attn_type_list")]
    return _minimax(c, is_linear, "layernorm_{}_alpha", "layernorm_{}_beta", parts, partial)


def _minimax(
    c: HF, is_linear: Sequence[bool], alpha: str, beta: str, parts: tuple[str, str, str], partial: float
) -> tuple[Decoder, Names]:
    """Residuals are the norms' results, times `alpha`. Heads forget more slowly from layer to layer."""
    c.skip("block_size")  # positions that others compute at a time
    for part in parts:
        c.refuse((factor := c.get(beta.format(part), 1)) != 1, f"{beta.format(part)}={factor!r}")
    full, linear, after = (float(c.get(alpha.format(part), 1)) for part in parts)
    norm, num_layers, size = Norm(eps=c.number("rms_norm_eps")), c.count("num_hidden_layers"), head_dim(c)
    rotary = rope(c, size, partial=partial, theta=1_000_000.0)
    attn, moe = attention(c, rope=rotary, window=c.sliding_window), _experts(c)
    heads = attn.num_heads
    c.refuse((act := c.text("hidden_act")) != "silu", f"hidden_act={act!r}")

    def block(i: int) -> Block:
        if not is_linear[i]:
            return pre_norm(attn, moe, norm, normed_residual=(full, after))
        rate = 1 - i / (num_layers - 1 + 1e-5) + 1e-5
        mixer = Lightning(num_heads=heads, head_dim=size, rate=rate, norm=Norm(eps=LIGHTNING_EPS))
        return pre_norm(mixer, moe, norm, normed_residual=(linear, after))

    renames = (
        *RENAMES,
        (r"\.mixer\.output_gate\.", ".mixer.g_proj."),
        (r"\.mixer\.out_proj\.", ".mixer.o_proj."),
        (r"\.mixer\.norm\.", ".mixer.o_norm."),
    )
    rows = heads * size
    splits = {"qkv_proj": Split({"q_proj": rows, "k_proj": rows, "v_proj": rows}, heads)}
    return decoder(c, block, norm), Names(renames=renames, splits=splits, ignored=(DECAYS,))


def _experts(c: HF) -> MoE:
    return MoE(num_experts=c.count("num_local_experts"), top_k=c.count("num_experts_per_tok"), expert=mlp(c))


def phi_moe(c: HF) -> tuple[Decoder, Names]:
    """Layer norms, biases of attention and the head, and experts that are weighed one by one (Abdin et al. 2024)."""
    c.skip("input_jitter_noise")
    for key, known in (("router_jitter_noise", JITTER), ("num_experts_per_tok", 2)):
        c.refuse((value := c.get(key, known)) != known, f"{key}={value}")
    norm, bias = Norm(kind="layer", eps=c.number("rms_norm_eps"), bias=True), bool(c.attention_bias)
    moe = MoE(
        num_experts=c.count("num_local_experts"), top_k=2, expert=mlp(c), score="sparse_mixer", renorm=False
    )
    attn = attention(c, window=c.sliding_window, rope=_phi_rope(c), bias=bias, out_bias=bias)
    spec = decoder(c, pre_norm(attn, moe, norm), norm, head_bias=bool(c.lm_head_bias))
    return spec, Names(renames=(*RENAMES, (r"\.mlp\.router\.", ".mlp.gate.")))


def _phi_rope(c: HF) -> Rope:
    """What cosines and sines are multiplied by is stated, once for short and once for long sequences."""
    rotary, found = rope(c, head_dim(c), theta=1_000_000.0), rope_parameters(c)
    if rotary.scaling is None:
        return rotary
    short, long = found.get("short_mscale"), found.get("long_mscale")
    c.refuse(rotary.scaling["rope_type"] != "longrope", f"rope_type {rotary.scaling['rope_type']!r}")
    c.refuse(short is None or short != long, f"short_mscale={short} with long_mscale={long}")
    return replace(rotary, scaling={**rotary.scaling, "attention_factor": short})


def minimax_m2(c: HF) -> tuple[Decoder, Names]:
    """Sigmoid scores with a correction; q and k are normalised over all heads together, and rotated in part."""
    c.refuse((kind := c.get("scoring_func", "sigmoid")) != "sigmoid", f"scoring_func={kind!r}")
    for key in ("use_qk_norm", "use_routing_bias"):
        c.refuse(not c.get(key, True), f"{key}=false")
    c.refuse_if_set("shared_intermediate_size")
    linear = any(kind != 1 for kind in c.attn_type_list or ())
    c.refuse(linear, "attn_type_list with layers of linear attention")
    c.skip("use_mtp", "num_mtp_modules", "mtp_transformer_layers")  # layers that predict further tokens
    norm, size = Norm(eps=c.number("rms_norm_eps")), c.count("head_dim")
    partial = c.rotary_dim / size if c.rotary_dim else 1.0
    rotary = rope(c, size, partial=partial, theta=5_000_000.0)
    attn = attention(c, head_dim=size, rope=rotary, qk_norm=norm, qk_norm_span="full")
    moe = MoE(
        num_experts=c.count("num_local_experts", "num_experts"),
        top_k=c.count("num_experts_per_tok"),
        expert=mlp(c),
        score="sigmoid",
        correction=True,
    )
    return decoder(c, pre_norm(attn, moe, norm), norm), Names(renames=(*RENAMES, CORRECTION))
