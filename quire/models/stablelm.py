"""StableLM: rotary embedding of a quarter of each head; sublayers in sequence or parallel."""

from quire.models.common import attention, decoder, mlp, plain_head_dim, rope
from quire.models.hf import HF
from quire.models.names import LLAMA, Names
from quire.models.spec import Block, Decoder, Norm


def stablelm(c: HF) -> tuple[Decoder, Names]:
    c.refuse_if_set("qk_layernorm")
    norm, size = Norm(kind="layer", eps=c.number("layer_norm_eps"), bias=True), plain_head_dim(c)
    bias = bool(c.use_qkv_bias)
    attn = attention(c, head_dim=size, bias=bias, rope=rope(c, size, partial=0.25))
    parallel = bool(c.use_parallel_residual)
    second = None if parallel else norm
    block = Block(mixer=attn, mlp=mlp(c), attn_norm=norm, mlp_norm=second, parallel=parallel)
    return decoder(c, block, norm), Names(renames=LLAMA)
