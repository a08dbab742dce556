"""OPT and BioGPT: learned positions that start at 2; XGLM and CTRL: positions that no one learned."""

from dataclasses import replace

from quire.models.common import (
    activation,
    decoder,
    mlp,
    multi_head,
    plain_head_dim,
    pre_norm,
    tied_by_default,
)
from quire.models.hf import HF
from quire.models.names import Names
from quire.models.spec import MLP, Decoder, Norm

OFFSET = 2


def opt(c: HF) -> tuple[Decoder, Names]:
    dim, heads, bias = (
        c.count("hidden_size"),
        c.count("num_attention_heads"),
        bool(c.get("enable_bias", True)),
    )
    c.refuse(not c.get("do_layer_norm_before", True), "do_layer_norm_before=False")
    c.refuse((c.word_embed_proj_dim or dim) != dim, f"word_embed_proj_dim={c.word_embed_proj_dim}")
    c.refuse_if_set("_remove_final_layer_norm")
    affine = bool(c.get("layer_norm_elementwise_affine", True))
    norm = Norm(kind="layer", eps=1e-5, weight=affine, bias=affine)
    attn = multi_head(heads, plain_head_dim(c), None, bias=bias, out_bias=bias)
    act = activation(c, c.text("activation_function"))
    feed_forward = MLP(hidden=c.count("ffn_dim"), act=act, gated=False, bias=bias)
    positions = {"num_positions": c.count("max_position_embeddings") + OFFSET, "position_offset": OFFSET}
    return decoder(c, pre_norm(attn, feed_forward, norm), norm, tied=tied_by_default(c), **positions), Names(
        renames=RENAMES
    )


def biogpt(c: HF) -> tuple[Decoder, Names]:
    """Embeddings are scaled (Luo et al. 2022)."""
    c.skip("layer_norm_eps")  # Hugging Face's network does not use it
    norm = Norm(kind="layer", eps=1e-5, bias=True)
    attn = multi_head(c.count("num_attention_heads"), plain_head_dim(c), None, bias=True, out_bias=True)
    scale = c.count("hidden_size") ** 0.5 if c.get("scale_embedding", True) else 1.0
    positions = {"num_positions": c.count("max_position_embeddings") + OFFSET, "position_offset": OFFSET}
    renames = (
        (r"^biogpt\.", ""),
        (r"^layer_norm\.", "norm."),
        (r"^output_projection\.", "lm_head."),
        *RENAMES,
    )
    block = pre_norm(attn, mlp(c, gated=False, bias=True), norm)
    spec = decoder(c, block, norm, embed_scale=scale, tied=tied_by_default(c), **positions)
    return spec, Names(renames=renames)


def xglm(c: HF) -> tuple[Decoder, Names]:
    c.refuse_if_set("add_cross_attention")
    dim, heads = c.count("d_model"), c.count("attention_heads")
    norm, act = Norm(kind="layer", eps=1e-5, bias=True), activation(c, c.text("activation_function"))
    c.refuse(dim % (2 * heads) > 0 or dim < 4, f"d_model={dim} with attention_heads={heads}")
    attn = multi_head(heads, dim // heads, None, bias=True, out_bias=True)
    feed_forward = MLP(hidden=c.count("ffn_dim"), act=act, gated=False, bias=True)
    own = {
        "dim": dim,
        "num_layers": c.count("num_layers"),
        "sinusoids": dim // 2 - 1,
        "position_offset": OFFSET,
        "embed_scale": dim**0.5 if c.get("scale_embedding", True) else 1.0,
    }
    spec = decoder(c, pre_norm(attn, feed_forward, norm), norm, tied=tied_by_default(c), **own)
    return spec, Names(renames=((r"^model\.layer_norm\.", "norm."), (r"^model\.", ""), *RENAMES))


def ctrl(c: HF) -> tuple[Decoder, Names]:
    """Its norms but the last have an epsilon of their own; the head has a bias (Keskar et al. 2019)."""
    dim, norm = c.count("n_embd"), Norm(kind="layer", eps=1e-6, bias=True)
    attn = multi_head(c.count("n_head"), plain_head_dim(c), None, bias=True, out_bias=True)
    feed_forward = MLP(hidden=c.count("dff"), act="relu", gated=False, bias=True)
    own = {
        "dim": dim,
        "num_layers": c.count("n_layer"),
        "max_length": c.count("n_positions"),
        "sinusoids": dim // 2,
        "embed_scale": dim**0.5,
        "head_bias": True,
    }
    last = replace(norm, eps=c.number("layer_norm_epsilon"))
    renames = (
        (r"^transformer\.", ""),
        (r"^w\.", "embed_tokens."),
        (r"^h\.", "layers."),
        (r"^layernorm\.", "norm."),
        (r"\.layernorm1\.", ".attn_norm."),
        (r"\.layernorm2\.", ".mlp_norm."),
        (r"\.multi_head_attention\.W([qkv])\.", r".mixer.\1_proj."),
        (r"\.multi_head_attention\.dense\.", ".mixer.o_proj."),
        (r"\.ffn\.0\.", ".mlp.up_proj."),
        (r"\.ffn\.2\.", ".mlp.down_proj."),
    )
    spec = decoder(c, pre_norm(attn, feed_forward, norm), last, tied=tied_by_default(c), **own)
    return spec, Names(renames=renames)


RENAMES = (
    (r"^(model\.)?decoder\.", ""),
    (r"^final_layer_norm\.", "norm."),
    (r"\.self_attn_layer_norm\.", ".attn_norm."),
    (r"\.final_layer_norm\.", ".mlp_norm."),
    (r"\.fc1\.", ".mlp.up_proj."),
    (r"\.fc2\.", ".mlp.down_proj."),
    (r"\.self_attn\.out_proj\.", ".mixer.o_proj."),
    (r"\.self_attn\.", ".mixer."),
)
