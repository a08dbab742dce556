"""GPT-2, GPT-J and GPT-NeoX (Pythia): layer norms with biases, feed-forward layers without gates."""

from quire.models.common import activation, decoder, mlp, multi_head, plain_head_dim, rope, tied_by_default
from quire.models.hf import HF
from quire.models.names import Names, Split
from quire.models.spec import MLP, Block, Decoder, Norm, Rope


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

    renames = (
        *_EARLY,
        (r"^wpe\.", "embed_positions."),
        (r"\.ln_2\.", ".mlp_norm."),
        (r"\.attn\.c_proj\.", ".mixer.o_proj."),
        (r"\.attn\.", ".mixer."),
        (r"\.c_fc\.", ".up_proj."),
        (r"\.c_proj\.", ".down_proj."),
    )
    splits = {"c_attn": Split({"q_proj": dim, "k_proj": dim, "v_proj": dim})}
    names = Names(renames=renames, splits=splits, transposed=("c_attn", "o_proj", "up_proj", "down_proj"))
    positions = c.count("n_positions")
    return decoder(c, block, norm, **_sizes(c), num_positions=positions, tied=tied_by_default(c)), names


def gptj(c: HF) -> tuple[Decoder, Names]:
    """Parallel sublayers behind one norm; rotary embedding of neighbouring dimensions (Wang 2021)."""
    norm = _norm(c, "layer_norm_epsilon")
    rotary = Rope(dim=c.count("rotary_dim"), interleaved=True)
    attn = multi_head(c.count("n_head"), plain_head_dim(c), rotary)
    block = Block(mixer=attn, mlp=_plain_mlp(c), attn_norm=norm, mlp_norm=None, parallel=True)
    renames = (
        *_EARLY,
        (r"\.attn\.out_proj\.", ".mixer.o_proj."),
        (r"\.attn\.", ".mixer."),
        (r"\.fc_in\.", ".up_proj."),
        (r"\.fc_out\.", ".down_proj."),
    )
    return decoder(c, block, norm, **_sizes(c), head_bias=True), Names(renames=renames)


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
    renames = (
        (r"^gpt_neox\.", ""),
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
    dim = c.count("hidden_size")
    splits = {"query_key_value": Split({"q_proj": dim, "k_proj": dim, "v_proj": dim}, per_group=heads)}
    return decoder(c, block, norm), Names(renames=renames, splits=splits)


_EARLY = (
    (r"^transformer\.", ""),
    (r"^h\.", "layers."),
    (r"^wte\.", "embed_tokens."),
    (r"^ln_f\.", "norm."),
    (r"\.ln_1\.", ".attn_norm."),
)


def _norm(c: HF, eps_key: str) -> Norm:
    return Norm(kind="layer", eps=c.number(eps_key), bias=True)


def _sizes(c: HF) -> dict[str, int]:
    return {"dim": c.count("n_embd"), "num_layers": c.count("n_layer"), "max_length": c.count("n_positions")}


def _plain_mlp(c: HF) -> MLP:
    hidden, act = c.n_inner or 4 * c.count("n_embd"), activation(c, c.text("activation_function"))
    return MLP(hidden=hidden, act=act, gated=False, bias=True)
