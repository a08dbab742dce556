"""Llamas and a GLM whose authors spell keys and tensors their own way: InternLM 2, EXAONE 3, Orion, ChatGLM."""

from quire.models.common import (
    attention,
    biases,
    decoder,
    kv_heads,
    mlp,
    plain_head_dim,
    pre_norm,
)
from quire.models.hf import HF
from quire.models.names import LLAMA, Names, Split
from quire.models.spec import MLP, Attention, Decoder, Norm, Rope

INTERNLM = (
    (r"^model\.", ""),
    (r"^tok_embeddings\.", "embed_tokens."),
    (r"^output\.", "lm_head."),
    (r"\.attention_norm\.", ".attn_norm."),
    (r"\.ffn_norm\.", ".mlp_norm."),
    (r"\.attention\.", ".mixer."),
    (r"\.wo\.", ".o_proj."),
    (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
    (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
    (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
)
EXAONE = (
    (r"^transformer\.wte\.", "embed_tokens."),
    (r"^transformer\.ln_f\.", "norm."),
    (r"^transformer\.h\.", "layers."),
    (r"\.ln_1\.", ".attn_norm."),
    (r"\.ln_2\.", ".mlp_norm."),
    (r"\.attn\.attention\.", ".mixer."),
    (r"\.mixer\.out_proj\.", ".mixer.o_proj."),
    (r"\.mlp\.c_fc_0\.", ".mlp.gate_proj."),
    (r"\.mlp\.c_fc_1\.", ".mlp.up_proj."),
    (r"\.mlp\.c_proj\.", ".mlp.down_proj."),
)
CHATGLM = (
    (r"^transformer\.embedding\.word_embeddings\.", "embed_tokens."),
    (r"^transformer\.output_layer\.", "lm_head."),
    (r"^transformer\.encoder\.final_layernorm\.", "norm."),
    (r"^transformer\.encoder\.", ""),
    (r"\.self_attention\.dense\.", ".self_attn.o_proj."),
    (r"\.self_attention\.", ".self_attn."),
    (r"\.dense_4h_to_h\.", ".down_proj."),
    *LLAMA,
)
FREQUENCIES = (r"^transformer\.rotary_pos_emb\.",)


def internlm2(c: HF) -> tuple[Decoder, Names]:
    """Queries of a group lie before its key and its value in one tensor."""
    norm, bias = Norm(eps=c.number("rms_norm_eps")), bool(c.bias)
    size = plain_head_dim(c)
    attn = attention(c, head_dim=size, num_kv_heads=kv_heads(c), bias=bias, out_bias=bias)
    names = Names(renames=INTERNLM, splits={"wqkv": _fused(attn, attn.num_kv_heads)})
    return decoder(c, pre_norm(attn, mlp(c), norm), norm), names


def exaone(c: HF) -> tuple[Decoder, Names]:
    norm = Norm(eps=c.number("layer_norm_epsilon"))
    feed_forward = mlp(c, act=c.text("activation_function"))
    block = pre_norm(attention(c, num_kv_heads=kv_heads(c)), feed_forward, norm)
    return decoder(c, block, norm, num_layers=c.count("num_layers", "num_hidden_layers")), Names(
        renames=EXAONE
    )


def orion(c: HF) -> tuple[Decoder, Names]:
    """Layer norms."""
    norm = Norm(kind="layer", eps=c.number("rms_norm_eps"), bias=True)
    attn = attention(c, head_dim=plain_head_dim(c), **biases(c))
    return decoder(c, pre_norm(attn, mlp(c), norm), norm), Names(renames=LLAMA)


def chatglm(c: HF) -> tuple[Decoder, Names]:
    """ChatGLM 2 and 3, GLM 4 as it was first published: neighbouring dimensions of half a head are rotated."""
    c.refuse_if_set(
        "add_bias_linear", "apply_residual_connection_post_layernorm", "pre_seq_len", "quantization_bit"
    )
    for key in ("rmsnorm", "post_layer_norm", "original_rope"):
        c.refuse(not c.get(key, True), f"{key}=false")
    c.skip("apply_query_key_layer_scaling", "attention_softmax_in_fp32", "bias_dropout_fusion", "vocab_size")
    c.skip("fp32_residual_connection", "prefix_projection", "multi_query_group_num")
    norm, size, heads = (
        Norm(eps=c.number("layernorm_epsilon")),
        c.count("kv_channels"),
        c.count("num_attention_heads"),
    )
    attn = Attention(
        num_heads=heads,
        num_kv_heads=c.count("multi_query_group_num") if c.multi_query_attention else heads,
        head_dim=size,
        rope=Rope(dim=size // 2, theta=10_000.0 * c.get("rope_ratio", 1), interleaved=True),
        bias=bool(c.need("add_qkv_bias")),
    )
    hidden = c.count("ffn_hidden_size")
    spec = decoder(
        c,
        pre_norm(attn, MLP(hidden=hidden), norm),
        norm,
        num_layers=c.count("num_layers"),
        max_length=c.count("seq_length"),
        vocab_size=c.count("padded_vocab_size"),
    )
    halves = Split({"gate_proj": hidden, "up_proj": hidden})
    splits = {"query_key_value": _fused(attn), "dense_h_to_4h": halves}
    return spec, Names(renames=CHATGLM, splits=splits, ignored=FREQUENCIES)


def _fused(attn: Attention, groups: int = 1) -> Split:
    q, kv = (n * attn.head_dim for n in (attn.num_heads, attn.num_kv_heads))
    return Split({"q_proj": q, "k_proj": kv, "v_proj": kv}, groups)
