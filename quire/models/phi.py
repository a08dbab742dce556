"""Phi 1 and 2 (parallel sublayers, biases everywhere), and Phi 3 and 4 (Llama with fused projections)."""

from quire.models.common import attention, decoder, head_dim, kv_heads, mlp, pre_norm, rope
from quire.models.hf import HF
from quire.models.names import LLAMA, Names, Split
from quire.models.spec import Block, Decoder, Norm


def phi(c: HF) -> tuple[Decoder, Names]:
    c.refuse_if_set("qk_layernorm")
    norm = Norm(kind="layer", eps=c.number("layer_norm_eps"), bias=True)
    rotary = rope(c, head_dim(c), partial=0.5)
    attn = attention(c, rope=rotary, num_kv_heads=kv_heads(c), bias=True, out_bias=True)
    feed_forward = mlp(c, gated=False, bias=True)
    block = Block(mixer=attn, mlp=feed_forward, attn_norm=norm, mlp_norm=None, parallel=True)
    renames = (
        *LLAMA,
        (r"^final_layernorm\.", "norm."),
        (r"\.dense\.", ".o_proj."),
        (r"\.fc1\.", ".up_proj."),
        (r"\.fc2\.", ".down_proj."),
    )
    return decoder(c, block, norm, head_bias=True), Names(renames=renames)


def phi3(c: HF) -> tuple[Decoder, Names]:
    """Its first checkpoints call their rotary embedding "su" or "yarn" and mean longrope."""
    c.count("original_max_position_embeddings")  # Hugging Face's own default would rarely be right
    norm, size = Norm(eps=c.number("rms_norm_eps")), head_dim(c)
    attn = attention(c, rope=rope(c, size, partial=1.0), num_kv_heads=kv_heads(c), window=c.sliding_window)
    q, kv, f = attn.num_heads * size, attn.num_kv_heads * size, c.count("intermediate_size")
    splits = {
        "qkv_proj": Split({"q_proj": q, "k_proj": kv, "v_proj": kv}),
        "gate_up_proj": Split({"gate_proj": f, "up_proj": f}),
    }
    return decoder(c, pre_norm(attn, mlp(c), norm), norm), Names(renames=LLAMA, splits=splits)
