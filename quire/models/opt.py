"""OPT and BioGPT: learned positions that start at 2."""

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
