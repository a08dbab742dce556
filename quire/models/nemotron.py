"""Nemotron 3 and 4, Minitron: layer norms that store weight - 1, squared ReLU, rotary halves of heads."""

from quire.models.common import attention, biases, decoder, head_dim, kv_heads, mlp, pre_norm, rope
from quire.models.hf import HF
from quire.models.names import LLAMA, Names
from quire.models.spec import Decoder, Norm


def nemotron(c: HF) -> tuple[Decoder, Names]:
    norm = Norm(kind="layer", eps=c.number("norm_eps"), bias=True, offset=1.0)
    attn = attention(c, rope=rope(c, head_dim(c), partial=0.5), num_kv_heads=kv_heads(c), **biases(c))
    feed_forward = mlp(c, gated=False, bias=bool(c.mlp_bias))
    return decoder(c, pre_norm(attn, feed_forward, norm), norm), Names(renames=LLAMA)
