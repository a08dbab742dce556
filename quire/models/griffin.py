"""RecurrentGemma: Griffin's recurrences in two of three layers, local attention in the third (Botev et al. 2024)."""

import math

from quire.errors import ModelError
from quire.models.common import (
    activation,
    attention,
    decoder,
    kv_heads,
    mlp,
    plain_head_dim,
    pre_norm,
    rope,
    tied_by_default,
)
from quire.models.hf import HF
from quire.models.mamba import LONGEST
from quire.models.names import Names
from quire.models.spec import RGLRU, Block, Decoder, Norm

NAMES = Names(
    renames=(
        (r"^model\.", ""),
        (r"^final_norm\.", "norm."),
        (r"\.temporal_pre_norm\.", ".attn_norm."),
        (r"\.channel_pre_norm\.", ".mlp_norm."),
        (r"\.temporal_block\.", ".mixer."),
        (r"\.mlp_block\.", ".mlp."),
    )
)


def recurrent_gemma(c: HF) -> tuple[Decoder, Names]:
    """Norms store weight - 1, embeddings are scaled, half of each head is rotated."""
    c.skip("w_init_variance_scale", "final_w_init_variance_scale", "_block_types", "head_dim")
    norm, size = Norm(eps=c.get("rms_norm_eps", 1e-6), offset=1.0), plain_head_dim(c)
    act = c.get("hidden_activation", "gelu_pytorch_tanh")
    whole = attention(
        c,
        num_kv_heads=kv_heads(c),
        head_dim=size,
        rope=rope(c, size, partial=0.5),
        window=c.get("attention_window_size", 2048),
        bias=bool(c.attention_bias),
        out_bias=True,
    )
    heads = c.count("num_attention_heads")
    channels = c.lru_width or c.count("hidden_size")
    if channels % heads:
        raise ModelError(f"config.json: lru_width {channels} is not a multiple of {heads} heads")
    local = RGLRU(channels=channels, num_heads=heads, width=c.get("conv1d_width", 4), act=activation(c, act))
    feed_forward = mlp(c, act=act, hidden=c.count("intermediate_size") // 2, bias=True)
    kinds = c.get("block_types", ("recurrent", "recurrent", "attention"))
    c.refuse(not set(kinds) <= {"recurrent", "attention"}, f"block_types={kinds!r}")

    def block(i: int) -> Block:
        return pre_norm(local if kinds[i % len(kinds)] == "recurrent" else whole, feed_forward, norm)

    spec = decoder(
        c,
        block,
        norm,
        max_length=c.max_position_embeddings or LONGEST,
        tied=tied_by_default(c),
        embed_scale=_bfloat16(math.sqrt(c.count("hidden_size"))),
        logit_softcap=c.get("logits_soft_cap", 30.0),
    )
    return spec, NAMES


def _bfloat16(x: float) -> float:
    """The nearest number of that type, which the factor is kept in whatever the network's type."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(mantissa * 256), exponent - 8)
