"""Mixtral: Mistral with experts in every layer."""

from quire.models.common import attention, decoder, head_dim, mlp, pre_norm, rope
from quire.models.hf import HF
from quire.models.names import LLAMA, Names
from quire.models.spec import Decoder, MoE, Norm


def mixtral(c: HF) -> tuple[Decoder, Names]:
    norm = Norm(eps=c.number("rms_norm_eps"))
    moe = MoE(num_experts=c.count("num_local_experts"), top_k=c.count("num_experts_per_tok"), expert=mlp(c))
    attn = attention(c, window=c.sliding_window, rope=rope(c, head_dim(c), theta=1_000_000.0))
    renames = (
        *LLAMA,
        (r"\.block_sparse_moe\.", ".mlp."),
        (r"\.w1\.", ".gate_proj."),
        (r"\.w3\.", ".up_proj."),
        (r"\.w2\.", ".down_proj."),
    )
    return decoder(c, pre_norm(attn, moe, norm), norm), Names(renames=renames)
