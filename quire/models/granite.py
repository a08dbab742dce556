"""Granite 3: Llama with a multiplier at each end of each part."""

from quire.models.common import attention, biases, decoder, kv_heads, mlp, pre_norm
from quire.models.hf import HF
from quire.models.names import LLAMA, Names
from quire.models.spec import Decoder, Norm


def granite(c: HF) -> tuple[Decoder, Names]:
    norm = Norm(eps=c.number("rms_norm_eps"))
    attn = attention(c, num_kv_heads=kv_heads(c), scale=c.number("attention_multiplier"), **biases(c))
    block = pre_norm(
        attn, mlp(c, bias=bool(c.mlp_bias)), norm, residual_scale=c.number("residual_multiplier")
    )
    scales = {"embed_scale": c.number("embedding_multiplier"), "logit_scale": 1 / c.number("logits_scaling")}
    return decoder(c, block, norm, **scales), Names(renames=LLAMA)
