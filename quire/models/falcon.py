"""Falcon: multi-query (7B), grouped (40B, 180B, 11B) or plain (RW) attention, fused group by group."""

from quire.models.common import activation, decoder, multi_head, plain_head_dim, rope, tied_by_default
from quire.models.hf import HF
from quire.models.names import Names, Split
from quire.models.spec import MLP, Block, Decoder, Norm


def falcon(c: HF) -> tuple[Decoder, Names]:
    c.refuse_if_set("alibi")
    c.skip("multi_query", "num_kv_heads")  # each matters in one layout only
    grouped, parallel = bool(c.new_decoder_architecture), bool(c.get("parallel_attn", True))
    c.refuse(grouped and not parallel, "new_decoder_architecture without parallel_attn")
    dim, heads, size = c.count("hidden_size"), c.count("num_attention_heads"), plain_head_dim(c)
    groups = (c.num_kv_heads or heads) if grouped else 1 if c.get("multi_query", True) else heads
    bias = bool(c.bias)
    attn = multi_head(heads, size, rope(c, size), num_kv_heads=groups, bias=bias, out_bias=bias)
    act = activation(c, c.get("activation", "gelu"))
    feed_forward = MLP(hidden=c.ffn_hidden_size or 4 * dim, act=act, gated=False, bias=bias)

    norm = Norm(kind="layer", eps=c.number("layer_norm_epsilon"), bias=True)
    num_norms = c.num_ln_in_parallel_attn or (2 if grouped or not parallel else 1)
    unknown = num_norms == 2 and parallel and not grouped
    c.refuse(unknown, "num_ln_in_parallel_attn=2 without new_decoder_architecture")
    second = norm if num_norms == 2 or not parallel else None
    block = Block(mixer=attn, mlp=feed_forward, attn_norm=norm, mlp_norm=second, parallel=parallel)
    kv = groups * size
    splits = {"query_key_value": Split({"q_proj": dim, "k_proj": kv, "v_proj": kv}, per_group=groups)}
    length, tied = c.get("max_position_embeddings", 2048), tied_by_default(c)
    return decoder(c, block, norm, max_length=length, tied=tied), Names(renames=RENAMES, splits=splits)


RENAMES = (
    (r"^transformer\.", ""),
    (r"^h\.", "layers."),
    (r"^word_embeddings\.", "embed_tokens."),
    (r"^ln_f\.", "norm."),
    (r"\.(ln_attn|input_layernorm)\.", ".attn_norm."),
    (r"\.(ln_mlp|post_attention_layernorm)\.", ".mlp_norm."),
    (r"\.self_attention\.dense\.", ".mixer.o_proj."),
    (r"\.self_attention\.", ".mixer."),
    (r"\.dense_h_to_4h\.", ".up_proj."),
    (r"\.dense_4h_to_h\.", ".down_proj."),
)
