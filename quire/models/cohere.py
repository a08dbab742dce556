"""Command R, R+, R7B and A: parallel sublayers behind one layer norm without bias, scaled logits."""

from typing import Any

from quire.models.common import (
    attention,
    biases,
    decoder,
    head_dim,
    kv_heads,
    layer_types,
    mlp,
    plain_head_dim,
    rope,
    tied_by_default,
    window,
)
from quire.models.hf import HF
from quire.models.names import LLAMA, Names
from quire.models.spec import Attention, Block, Decoder, Norm


def cohere(c: HF) -> tuple[Decoder, Names]:
    norm = _norm(c)
    rotary = rope(c, head_dim(c), theta=500_000.0, interleaved=True)
    qk_norm = norm if c.use_qk_norm else None
    mixer = attention(c, rope=rotary, qk_norm=qk_norm, qk_norm_span="heads", **_heads(c))
    return decoder(c, _parallel(c, mixer), norm, **_head(c)), Names(renames=LLAMA)


def cohere2(c: HF) -> tuple[Decoder, Names]:
    """Three of four layers are local; the others have no rotary embedding."""
    c.skip("head_dim")  # written, but always an equal share
    pattern, size = c.get("sliding_window_pattern", 4), plain_head_dim(c)
    local = layer_types(c, lambda i: (i + 1) % pattern != 0)
    rotary = rope(c, size, interleaved=True)

    def block(i: int) -> Block:
        here = rotary if local[i] and window(c) else None
        return _parallel(c, attention(c, rope=here, head_dim=size, window=window(c, local[i]), **_heads(c)))

    return decoder(c, block, _norm(c), **_head(c)), Names(renames=LLAMA)


def _heads(c: HF) -> dict[str, Any]:
    return {"num_kv_heads": kv_heads(c), **biases(c)}


def _norm(c: HF) -> Norm:
    return Norm(kind="layer", eps=c.number("layer_norm_eps"))


def _parallel(c: HF, mixer: Attention) -> Block:
    return Block(mixer=mixer, mlp=mlp(c), attn_norm=_norm(c), mlp_norm=None, parallel=True)


def _head(c: HF) -> dict[str, float]:
    return {"logit_scale": c.number("logit_scale"), "tied": tied_by_default(c)}
