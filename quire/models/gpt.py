"""GPT-2, Neo, J and NeoX and what follows them: layer norms with biases, feed-forward layers without gates."""

from quire.errors import ModelError
from quire.models.common import activation, decoder, mlp, multi_head, plain_head_dim, rope, tied_by_default
from quire.models.hf import HF
from quire.models.names import Names, Split
from quire.models.spec import MLP, Block, Decoder, Norm, Rope

CODEGEN_PARTS = 4
_NEO_TYPES = ((("global", "local"), 12),)  # Hugging Face's default


def gpt2(c: HF) -> tuple[Decoder, Names]:
    """Learned positions; projections are stored transposed."""
    c.refuse_if_set("add_cross_attention")
    dim, norm, feed_forward = c.count("n_embd"), _norm(c, "layer_norm_epsilon"), _plain_mlp(c)
    heads, size = c.count("n_head"), plain_head_dim(c)
    scale = None if c.get("scale_attn_weights", True) else 1.0

    def block(i: int) -> Block:
        here = (scale or size**-0.5) / (i + 1) if c.scale_attn_by_inverse_layer_idx else scale
        attn = multi_head(heads, size, None, bias=True, out_bias=True, scale=here)
        return Block(mixer=attn, mlp=feed_forward, attn_norm=norm, mlp_norm=norm)

    splits = {"c_attn": Split({"q_proj": dim, "k_proj": dim, "v_proj": dim})}
    transposed = ("c_attn", "o_proj", "up_proj", "down_proj")
    names = Names(renames=_POSITIONED, splits=splits, transposed=transposed)
    positions = c.count("n_positions")
    return decoder(c, block, norm, **_sizes(c), num_positions=positions, tied=tied_by_default(c)), names


def gpt_bigcode(c: HF) -> tuple[Decoder, Names]:
    """SantaCoder and StarCoder: GPT-2 with one head of keys and values (Shazeer 2019)."""
    c.refuse_if_set("add_cross_attention")
    c.skip("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")  # softmax is float32
    c.skip("num_key_value_heads")  # repeats multi_query
    dim, norm, heads, size = (
        c.count("n_embd"),
        _norm(c, "layer_norm_epsilon"),
        c.count("n_head"),
        plain_head_dim(c),
    )
    scale, shared = None if c.get("scale_attn_weights", True) else 1.0, bool(c.get("multi_query", True))
    kv = size if shared else dim
    attn = multi_head(
        heads, size, None, num_kv_heads=1 if shared else heads, bias=True, out_bias=True, scale=scale
    )
    block = Block(mixer=attn, mlp=_plain_mlp(c), attn_norm=norm, mlp_norm=norm)
    parts = {"q_proj": dim, "k_proj": kv, "v_proj": kv}
    splits = {"c_attn": Split(parts, per_group=1 if shared else heads)}
    positions = c.count("n_positions")
    spec = decoder(c, block, norm, **_sizes(c), num_positions=positions, tied=tied_by_default(c))
    return spec, Names(renames=_POSITIONED, splits=splits)


def gpt_neo(c: HF) -> tuple[Decoder, Names]:
    """Every other layer is local; scores are not scaled."""
    c.skip("attention_layers")  # repeats attention_types
    kinds = [
        kind for some, times in c.get("attention_types", _NEO_TYPES) for _ in range(times) for kind in some
    ]
    heads, num_layers, norm = c.count("num_heads"), c.count("num_layers"), _norm(c, "layer_norm_epsilon")
    unknown = sorted(set(map(str, kinds)) - {"global", "local"})
    c.refuse(bool(unknown), f"attention_types with {', '.join(unknown)} (known: global, local)")
    if len(kinds) != num_layers:
        raise ModelError(f"config.json: attention_types lists {len(kinds)} layers of {num_layers}")
    dim, window = c.count("hidden_size"), c.get("window_size", 256)
    act = activation(c, c.text("activation_function"))
    feed_forward = MLP(hidden=c.intermediate_size or 4 * dim, act=act, gated=False, bias=True)

    def block(i: int) -> Block:
        here = window if kinds[i] == "local" else None
        attn = multi_head(heads, dim // heads, None, scale=1.0, window=here, out_bias=True)
        return Block(mixer=attn, mlp=feed_forward, attn_norm=norm, mlp_norm=norm)

    positions = c.count("max_position_embeddings")
    sizes = {"num_layers": num_layers, "num_positions": positions}
    renames = ((r"\.attn\.attention\.out_proj\.", ".mixer.o_proj."), (r"\.attn\.attention\.", ".mixer."))
    return decoder(c, block, norm, **sizes, tied=tied_by_default(c)), Names(renames=(*renames, *_POSITIONED))


def gptj(c: HF) -> tuple[Decoder, Names]:
    """Parallel sublayers behind one norm; rotary embedding of neighbouring dimensions (Wang 2021)."""
    return _rotary_parallel(c), Names(renames=_PARALLEL)


def codegen(c: HF) -> tuple[Decoder, Names]:
    """GPT-J whose queries, values and keys are fused in the four parts that it was trained in."""
    dim = c.count("n_embd")
    splits = {"qkv_proj": Split({"q_proj": dim, "v_proj": dim, "k_proj": dim}, per_group=CODEGEN_PARTS)}
    c.refuse(c.count("n_head") % CODEGEN_PARTS > 0, f"n_head={c.n_head}")
    return _rotary_parallel(c), Names(renames=_PARALLEL, splits=splits)


def _rotary_parallel(c: HF) -> Decoder:
    norm = _norm(c, "layer_norm_epsilon")
    rotary = Rope(dim=c.count("rotary_dim"), interleaved=True)
    attn = multi_head(c.count("n_head"), plain_head_dim(c), rotary)
    block = Block(mixer=attn, mlp=_plain_mlp(c), attn_norm=norm, mlp_norm=None, parallel=True)
    return decoder(c, block, norm, **_sizes(c), head_bias=True)


def gpt_neox(c: HF) -> tuple[Decoder, Names]:
    """Queries, keys and values are fused head by head; parallel sublayers keep a norm each."""
    norm, size, heads = _norm(c, "layer_norm_eps"), plain_head_dim(c), c.count("num_attention_heads")
    default_theta = c.get("rotary_emb_base", 10_000.0)
    rotary = rope(c, size, partial=c.get("rotary_pct", 0.25), theta=default_theta)
    bias = bool(c.get("attention_bias", True))
    attn = multi_head(heads, size, rotary, bias=bias, out_bias=bias)
    parallel = bool(c.get("use_parallel_residual", True))
    feed_forward = mlp(c, gated=False, bias=True)
    block = Block(mixer=attn, mlp=feed_forward, attn_norm=norm, mlp_norm=norm, parallel=parallel)
    return decoder(c, block, norm), Names(renames=_NEOX, splits=_by_head(c))


def gpt_neox_japanese(c: HF) -> tuple[Decoder, Names]:
    """Sublayers in sequence, and one bias besides those of norms: of the last layer's attention."""
    norm, size, heads = _norm(c, "layer_norm_eps"), plain_head_dim(c), c.count("num_attention_heads")
    rotary = rope(c, size, partial=c.get("rotary_pct", 1.0), theta=c.get("rotary_emb_base", 10_000.0))
    hidden, last = (
        c.count("hidden_size") * c.count("intermediate_multiple_size"),
        c.count("num_hidden_layers") - 1,
    )
    feed_forward = mlp(c, hidden=hidden, gated=False)

    def block(i: int) -> Block:
        attn = multi_head(heads, size, rotary, out_bias=i == last)
        return Block(mixer=attn, mlp=feed_forward, attn_norm=norm, mlp_norm=norm)

    renames = ((r"\.attention\.dense_bias$", ".mixer.o_proj.bias"), *_NEOX)
    return decoder(c, block, norm, tied=tied_by_default(c)), Names(renames=renames, splits=_by_head(c))


def persimmon(c: HF) -> tuple[Decoder, Names]:
    """NeoX in sequence, with norms of queries and keys and squared ReLU (Elsen et al. 2023)."""
    norm, size, heads = _norm(c, "layer_norm_eps"), plain_head_dim(c), c.count("num_attention_heads")
    c.skip("num_key_value_heads")  # there are as many as query heads
    qk_norm = norm if c.get("qk_layernorm", True) else None
    rotary = rope(c, size, partial=0.5)
    attn = multi_head(heads, size, rotary, bias=True, out_bias=True, qk_norm=qk_norm)
    feed_forward = mlp(c, gated=False, bias=True)
    block = Block(mixer=attn, mlp=feed_forward, attn_norm=norm, mlp_norm=norm)
    renames = (
        (r"^model\.final_layernorm\.", "norm."),
        (r"^model\.", ""),
        (r"\.self_attn\.(q|k)_layernorm\.", r".mixer.\1_norm."),
        (r"\.self_attn\.", ".attention."),
        *_NEOX,
    )
    return decoder(c, block, norm), Names(renames=renames, splits=_by_head(c))


def _by_head(c: HF) -> dict[str, Split]:
    """Queries, keys and values of head 0, then of head 1..."""
    dim = c.count("hidden_size")
    parts = {"q_proj": dim, "k_proj": dim, "v_proj": dim}
    return {"query_key_value": Split(parts, per_group=c.count("num_attention_heads"))}


_EARLY = (
    (r"^transformer\.", ""),
    (r"^h\.", "layers."),
    (r"^wte\.", "embed_tokens."),
    (r"^ln_f\.", "norm."),
    (r"\.ln_1\.", ".attn_norm."),
)
_POSITIONED = (
    *_EARLY,
    (r"^wpe\.", "embed_positions."),
    (r"\.ln_2\.", ".mlp_norm."),
    (r"\.attn\.c_proj\.", ".mixer.o_proj."),
    (r"\.attn\.", ".mixer."),
    (r"\.c_fc\.", ".up_proj."),
    (r"\.c_proj\.", ".down_proj."),
)
_PARALLEL = (
    *_EARLY,
    (r"\.attn\.out_proj\.", ".mixer.o_proj."),
    (r"\.attn\.", ".mixer."),
    (r"\.fc_in\.", ".up_proj."),
    (r"\.fc_out\.", ".down_proj."),
)
_NEOX = (
    (r"^gpt_neox(_japanese)?\.", ""),
    (r"^embed_in\.", "embed_tokens."),
    (r"^embed_out\.", "lm_head."),
    (r"^final_layer_norm\.", "norm."),
    (r"\.attention\.dense\.", ".mixer.o_proj."),
    (r"\.attention\.", ".mixer."),
    (r"\.dense_h_to_4h\.", ".up_proj."),
    (r"\.dense_4h_to_h\.", ".down_proj."),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".mlp_norm."),
)


def _norm(c: HF, eps_key: str) -> Norm:
    return Norm(kind="layer", eps=c.number(eps_key), bias=True)


def _sizes(c: HF) -> dict[str, int]:
    return {"dim": c.count("n_embd"), "num_layers": c.count("n_layer"), "max_length": c.count("n_positions")}


def _plain_mlp(c: HF) -> MLP:
    hidden, act = c.n_inner or 4 * c.count("n_embd"), activation(c, c.text("activation_function"))
    return MLP(hidden=hidden, act=act, gated=False, bias=True)
