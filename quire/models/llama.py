"""Llama and the models that are Llama with one thing changed."""

from dataclasses import replace

from quire.models.common import (
    attention,
    biases,
    decoder,
    growth,
    has_rope,
    head_dim,
    kv_heads,
    layer_types,
    mlp,
    pre_norm,
    rope,
    tied_by_default,
    window,
)
from quire.models.hf import HF
from quire.models.names import LLAMA, Names
from quire.models.spec import MLP, Block, Decoder, Norm, Rope

CWM_THETA = 1_000_000.0
CWM_SCALING = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama(c: HF, theta: float = 10_000.0) -> tuple[Decoder, Names]:
    """`theta` is that of configs that do not say."""
    norm, rotary = Norm(eps=c.number("rms_norm_eps")), rope(c, head_dim(c), theta=theta)
    attn = attention(c, num_kv_heads=kv_heads(c), rope=rotary, **biases(c))
    block = pre_norm(attn, mlp(c, bias=bool(c.mlp_bias)), norm)
    return decoder(c, block, norm), Names(renames=LLAMA)


def emu3(c: HF) -> tuple[Decoder, Names]:
    """Of a network that also draws, the text."""
    c.count("num_key_value_heads")  # Hugging Face's default is that of one model
    return llama(c, theta=1_000_000.0)


def internlm3(c: HF) -> tuple[Decoder, Names]:
    """Llama, with names of its own for the keys of biases, which are all there or none."""
    norm = Norm(eps=c.number("rms_norm_eps"))
    bias, others = bool(c.get("qkv_bias", c.attention_bias)), bool(c.get("bias", c.mlp_bias))
    c.refuse(bias != others, "attention_bias (qkv_bias) other than mlp_bias (bias)")
    attn = attention(c, head_dim=c.count("head_dim"), bias=bias, out_bias=bias)
    return decoder(c, pre_norm(attn, mlp(c, bias=bias), norm), norm), Names(renames=LLAMA)


def iquest_coder(c: HF) -> tuple[Decoder, Names]:
    c.refuse_if_set("clip_qkv", "use_sliding_window")
    for key in ("head_dim", "num_key_value_heads"):  # Hugging Face's defaults are those of one model
        c.count(key)
    return llama(c)


def mistral(c: HF) -> tuple[Decoder, Names]:
    """Every layer is local, unless sliding_window is null; an absent one means 4096."""
    norm = Norm(eps=c.number("rms_norm_eps"))
    block = pre_norm(attention(c, window=window(c)), mlp(c), norm)
    return decoder(c, block, norm), Names(renames=LLAMA)


def internlm(c: HF) -> tuple[Decoder, Names]:
    """One setting for the biases of attention."""
    bias = bool(c.get("bias", True))
    norm = Norm(eps=c.number("rms_norm_eps"))
    attn = attention(c, num_kv_heads=kv_heads(c), bias=bias, out_bias=bias)
    return decoder(c, pre_norm(attn, mlp(c), norm), norm), Names(renames=LLAMA)


def apertus(c: HF) -> tuple[Decoder, Names]:
    """Norms of queries and keys; a feed-forward layer that is not gated, with a curve that was learned."""
    c.need("rope_parameters", "rope_scaling")  # Hugging Face's own default is of one model
    c.refuse((act := c.get("hidden_act", "xielu")) != "xielu", f"hidden_act={act!r}")
    c.refuse(not c.get("qk_norm", True), "qk_norm=false")
    c.refuse_if_set("post_norm", "mlp_bias")
    norm, rotary = Norm(eps=c.number("rms_norm_eps")), rope(c, head_dim(c), theta=12_000_000.0)
    attn = attention(c, num_kv_heads=kv_heads(c), rope=rotary, qk_norm=norm, **biases(c))
    feed_forward = MLP(hidden=c.count("intermediate_size"), act="xielu", gated=False)
    renames = (
        (r"\.attention_layernorm\.", ".attn_norm."),
        (r"\.feedforward_layernorm\.", ".mlp_norm."),
        *LLAMA,
    )
    return decoder(c, pre_norm(attn, feed_forward, norm), norm), Names(renames=renames)


def nanochat(c: HF) -> tuple[Decoder, Names]:
    """Norms without weights, of embeddings too. Queries and keys turn backwards.

    They are normalised after that, which without weights is the same as before.
    """
    norm, size = Norm(eps=c.number("rms_norm_eps"), weight=False), head_dim(c)
    rotary = rope(c, size)
    c.refuse(rotary.scaling is not None, "rotary embedding with a scaling")
    backwards = replace(rotary, scaling={"rope_type": "linear", "factor": -1.0})
    own = {
        "rope": backwards,
        "qk_norm": norm,
        "num_kv_heads": kv_heads(c),
        **biases(c),
    }
    block = pre_norm(attention(c, **own), mlp(c, gated=False), norm)
    cap = c.get("final_logit_softcapping", 15.0)
    renames = (*LLAMA, (r"\.fc1\.", ".up_proj."), (r"\.fc2\.", ".down_proj."))
    return decoder(c, block, norm, embed_norm=norm, logit_softcap=cap), Names(renames=renames)


def ministral(c: HF) -> tuple[Decoder, Names]:
    """Which layers are local is listed."""
    norm = Norm(eps=c.number("rms_norm_eps"))
    local = layer_types(c, lambda i: window(c) is not None)

    def block(i: int) -> Block:
        return pre_norm(attention(c, window=window(c, local[i])), mlp(c), norm)

    return decoder(c, block, norm), Names(renames=LLAMA)


def ministral3(c: HF) -> tuple[Decoder, Names]:
    """Every layer is local or none; queries grow with their position."""
    c.need("rope_parameters", "rope_scaling")  # Hugging Face's own default is a YaRN of one model
    c.stated("head_dim")
    norm = Norm(eps=c.number("rms_norm_eps"))
    block = pre_norm(attention(c, window=c.sliding_window, growth=growth(c)), mlp(c), norm)
    return decoder(c, block, norm), Names(renames=LLAMA)


def cwm(c: HF) -> tuple[Decoder, Names]:
    """All but every fourth layer are local (Code World Model, Copet et al. 2025)."""
    norm, size = Norm(eps=c.number("rms_norm_eps")), c.count("head_dim")
    local = layer_types(c, lambda i: i % 4 != 0)
    sliding = c.get("sliding_window", 8192) or None
    rotary = rope(c, size, theta=CWM_THETA)
    if not (c.rope_parameters or c.rope_scaling):
        rotary = Rope(dim=size, theta=CWM_THETA, scaling=CWM_SCALING)
    feed_forward = mlp(c, bias=bool(c.mlp_bias))

    def block(i: int) -> Block:
        here = sliding if local[i] else None
        return pre_norm(attention(c, head_dim=size, rope=rotary, window=here), feed_forward, norm)

    return decoder(c, block, norm), Names(renames=LLAMA)


def jais2(c: HF) -> tuple[Decoder, Names]:
    """Layer norms, and a feed-forward layer that is not gated."""
    norm = Norm(kind="layer", eps=c.number("layer_norm_eps"), bias=True)
    bias = bool(c.get("attention_bias", True))
    attn = attention(c, num_kv_heads=kv_heads(c), bias=bias, out_bias=bias)
    feed_forward = mlp(c, gated=False, bias=bool(c.get("mlp_bias", True)))
    return decoder(c, pre_norm(attn, feed_forward, norm), norm), Names(renames=LLAMA)


def arcee(c: HF) -> tuple[Decoder, Names]:
    """The feed-forward layer is not gated."""
    norm = Norm(eps=c.number("rms_norm_eps"))
    attn = attention(c, num_kv_heads=kv_heads(c), **biases(c))
    block = pre_norm(attn, mlp(c, gated=False, bias=bool(c.mlp_bias)), norm)
    return decoder(c, block, norm), Names(renames=LLAMA)


def smollm3(c: HF) -> tuple[Decoder, Names]:
    """Every fourth layer has no rotary embedding (Yang et al. 2025)."""
    norm = Norm(eps=c.number("rms_norm_eps"))
    turns = has_rope(c)
    sliding = c.get("sliding_window") if c.use_sliding_window else None
    local = layer_types(c, lambda i: sliding is not None and not turns[i])
    rotary = rope(c, head_dim(c), theta=2_000_000.0)
    feed_forward = mlp(c, bias=bool(c.mlp_bias))

    def block(i: int) -> Block:
        here, size = rotary if turns[i] else None, sliding if local[i] else None
        return pre_norm(attention(c, rope=here, window=size, **biases(c)), feed_forward, norm)

    return decoder(c, block, norm, tied=tied_by_default(c)), Names(renames=LLAMA)


def seed_oss(c: HF) -> tuple[Decoder, Names]:
    """The output projection has a bias of its own setting."""
    norm = Norm(eps=c.number("rms_norm_eps"))
    attn = attention(
        c,
        head_dim=c.count("head_dim"),
        bias=bool(c.get("attention_bias", True)),
        out_bias=bool(c.attention_out_bias),
    )
    return decoder(c, pre_norm(attn, mlp(c, bias=bool(c.mlp_bias)), norm), norm), Names(renames=LLAMA)


def hunyuan(c: HF) -> tuple[Decoder, Names]:
    """Queries and keys are normalised after the rotary embedding."""
    c.refuse_if_set("use_cla")
    norm = Norm(eps=c.number("rms_norm_eps"))
    attn = attention(c, num_kv_heads=kv_heads(c), qk_norm=norm, norm_after_rope=True, **biases(c))
    renames = (*LLAMA, (r"\.query_layernorm\.", ".q_norm."), (r"\.key_layernorm\.", ".k_norm."))
    return decoder(c, pre_norm(attn, mlp(c), norm), norm), Names(renames=renames)


def ernie(c: HF, size: int | None = None) -> tuple[Decoder, Names]:
    """Rotary embedding of neighbouring dimensions; one setting for every bias. `size` of a head, if not head_dim."""
    norm, bias, size = Norm(eps=c.number("rms_norm_eps")), bool(c.use_bias), size or c.count("head_dim")
    rotary = rope(c, size, theta=500_000.0, interleaved=True)
    attn = attention(c, rope=rotary, head_dim=size, bias=bias, out_bias=bias)
    block = pre_norm(attn, mlp(c, bias=bias), norm)
    return decoder(c, block, norm, tied=tied_by_default(c)), Names(renames=LLAMA)


def helium(c: HF) -> tuple[Decoder, Names]:
    """Rotary embedding of neighbouring dimensions; the output projection never has a bias."""
    norm, size = Norm(eps=c.number("rms_norm_eps")), c.count("head_dim")
    rotary = rope(c, size, theta=100_000.0, interleaved=True)
    attn = attention(c, rope=rotary, head_dim=size, **biases(c, out=False))
    return decoder(c, pre_norm(attn, mlp(c, bias=bool(c.mlp_bias)), norm), norm), Names(renames=LLAMA)
