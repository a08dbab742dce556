"""BLOOM and MPT: scores fall with the distance (ALiBi), and nothing else tells positions."""

from collections.abc import Mapping

from quire.models.common import alibi, decoder, multi_head, plain_head_dim, pre_norm, tied_by_default
from quire.models.falcon import RENAMES
from quire.models.hf import HF
from quire.models.names import Names, Split
from quire.models.spec import MLP, Decoder, Norm


def bloom(c: HF) -> tuple[Decoder, Names]:
    """Embeddings are normalised (BigScience 2022). Hugging Face's config knows no limit of the length."""
    c.refuse_if_set("apply_residual_connection_post_layernorm")
    c.skip("slow_but_exact")  # slices of a product, one after the other
    c.skip(
        "attention_softmax_in_fp32",
        "masked_softmax_fusion",
        "bias_dropout_fusion",
        "skip_bias_add",
        "offset_alibi",
    )
    dim, heads = c.count("n_embed", "hidden_size"), c.count("n_head", "num_attention_heads")
    norm = Norm(kind="layer", eps=c.number("layer_norm_epsilon"), bias=True)
    attn = multi_head(heads, dim // heads, None, bias=True, out_bias=True, slopes=alibi(heads))
    feed_forward = MLP(hidden=4 * dim, act="gelu_pytorch_tanh", gated=False, bias=True)
    sizes = {
        "dim": dim,
        "num_layers": c.count("n_layer", "num_hidden_layers"),
        "max_length": c.get("seq_length", 2048),
    }
    spec = decoder(
        c, pre_norm(attn, feed_forward, norm), norm, embed_norm=norm, tied=tied_by_default(c), **sizes
    )
    parts = {"q_proj": dim, "k_proj": dim, "v_proj": dim}
    renames = ((r"^(transformer\.)?word_embeddings_layernorm\.", "embed_norm."), *RENAMES)
    return spec, Names(renames=renames, splits={"query_key_value": Split(parts, per_group=heads)})


def mpt(c: HF) -> tuple[Decoder, Names]:
    """No biases, and projections that may be clipped."""
    own = c.attn_config or {}
    c.refuse(not isinstance(own, Mapping), f"attn_config={own!r}")
    for key, known in (
        ("attn_type", "multihead_attention"),
        ("alibi", True),
        ("alibi_bias_max", 8),
        ("prefix_lm", False),
        ("qk_ln", False),
    ):
        c.refuse((value := own.get(key, known)) != known, f"attn_config with {key}={value!r}")
    c.refuse(bool(own.get("attn_uses_sequence_id")), "attn_config with attn_uses_sequence_id=true")
    for key, usual in (("no_bias", True), ("expansion_ratio", 4), ("embedding_fraction", 1.0)):
        c.refuse((value := c.get(key, usual)) != usual, f"{key}={value}")
    c.refuse_if_set("logit_scale")
    c.skip(
        "learned_pos_emb", "norm_type", "init_config", "init_device", "verbose"
    )  # the first does not matter with slopes
    dim, heads, length = c.count("d_model"), c.count("n_heads"), c.count("max_seq_len")
    norm = Norm(kind="layer", eps=c.get("layer_norm_epsilon", 1e-5))
    attn = multi_head(
        heads,
        plain_head_dim(c),
        None,
        scale=own.get("softmax_scale"),
        clip=own.get("clip_qkv"),
        slopes=alibi(heads),
    )
    feed_forward = MLP(hidden=4 * dim, act="gelu", gated=False)
    sizes = {"dim": dim, "num_layers": c.count("n_layers"), "max_length": length}
    renames = (
        (r"^transformer\.", ""),
        (r"^blocks\.", "layers."),
        (r"^wte\.", "embed_tokens."),
        (r"^norm_f\.", "norm."),
        (r"\.norm_1\.", ".attn_norm."),
        (r"\.norm_2\.", ".mlp_norm."),
        (r"\.attn\.out_proj\.", ".mixer.o_proj."),
        (r"\.attn\.", ".mixer."),
        (r"\.ffn\.", ".mlp."),
    )
    splits = {"Wqkv": Split({"q_proj": dim, "k_proj": dim, "v_proj": dim})}
    spec = decoder(c, pre_norm(attn, feed_forward, norm), norm, tied=tied_by_default(c), **sizes)
    return spec, Names(renames=renames, splits=splits)
