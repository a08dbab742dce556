"""Mixtral: Mistral with experts in every layer; and MiniMax M2, which stores its experts likewise."""

from quire.models.common import attention, decoder, head_dim, mlp, pre_norm, rope
from quire.models.hf import HF
from quire.models.names import CORRECTION, LLAMA, Names
from quire.models.spec import Decoder, MoE, Norm

RENAMES = (
    *LLAMA,
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"\.w1\.", ".gate_proj."),
    (r"\.w3\.", ".up_proj."),
    (r"\.w2\.", ".down_proj."),
)


def mixtral(c: HF) -> tuple[Decoder, Names]:
    norm = Norm(eps=c.number("rms_norm_eps"))
    moe = MoE(num_experts=c.count("num_local_experts"), top_k=c.count("num_experts_per_tok"), expert=mlp(c))
    attn = attention(c, window=c.sliding_window, rope=rope(c, head_dim(c), theta=1_000_000.0))
    return decoder(c, pre_norm(attn, moe, norm), norm), Names(renames=RENAMES)


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
