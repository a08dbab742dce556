"""Gemma 1, 2, 3 (text) and VaultGemma: norms store weight - 1, embeddings are scaled, 2 and 3 norm sublayers twice."""

from collections.abc import Callable
from typing import Any

from quire.models.common import (
    attention,
    biases,
    decoder,
    layer_types,
    mlp,
    pre_norm,
    rope,
    sandwich,
    tied_by_default,
    window,
)
from quire.models.hf import HF
from quire.models.names import LLAMA, SANDWICH, Names
from quire.models.spans import spans_of
from quire.models.spec import Block, Decoder, Norm, Rope


def gemma(c: HF) -> tuple[Decoder, Names]:
    """The first release's "gelu" means its tanh approximation."""
    c.skip("hidden_activation")
    norm, attn = _norm(c), attention(c, **_heads(c))
    act = c.text("hidden_act")
    feed_forward = mlp(c, act="gelu_pytorch_tanh" if act == "gelu" else act)
    return _scaled(c, pre_norm(attn, feed_forward, norm), norm), Names(renames=LLAMA)


def gemma2(c: HF, post: bool = True) -> tuple[Decoder, Names]:
    """Every other layer is local; attention scores and final logits are capped (Gemma Team 2024).

    `post`: what a sublayer adds is normalised.
    """
    c.skip("hidden_act", "sliding_window_size")  # repeat hidden_activation and sliding_window
    local = layer_types(c, lambda i: i % 2 == 0)
    cap = c.get("attn_logit_softcapping", 50.0)
    blocks = {here: _sandwich(c, post, window=window(c, here), softcap=cap) for here in set(local)}
    final = c.get("final_logit_softcapping", 30.0)
    return _scaled(c, lambda i: blocks[local[i]], _norm(c), logit_softcap=final), Names(renames=SANDWICH)


def vault_gemma(c: HF) -> tuple[Decoder, Names]:
    """Gemma 2 without norms behind its sublayers."""
    return gemma2(c, post=False)


def gemma3(c: HF) -> tuple[Decoder, Names]:
    """Five of six layers are local, with a rotary base of their own; queries and keys are normalised."""
    c.refuse_if_set("attn_logit_softcapping")
    c.skip("hidden_act")
    pattern, norm = c.get("sliding_window_pattern", 6), _norm(c)
    local = layer_types(c, lambda i: (i + 1) % pattern != 0)
    blocks = {
        here: _sandwich(c, window=window(c, here), qk_norm=norm, rope=rope_per_type(c, here))
        for here in set(local)
    }
    spec = _scaled(c, lambda i: blocks[local[i]], norm, logit_softcap=c.final_logit_softcapping)
    return spec, Names(renames=SANDWICH)


def rope_per_type(c: HF, local: bool) -> Rope:
    if local and not c.rope_parameters:  # before transformers 5
        return Rope(dim=c.count("head_dim"), theta=c.get("rope_local_base_freq", 10_000.0))
    return rope(c, c.count("head_dim"), local=local, theta=1_000_000.0)


def _norm(c: HF) -> Norm:
    return Norm(eps=c.number("rms_norm_eps"), offset=1.0)


def _heads(c: HF) -> dict[str, Any]:
    spans = spans_of(c)
    c.refuse(
        bool(both := c.use_bidirectional_attention) and (spans is None or spans.tokens is not None),
        f"use_bidirectional_attention={both!r}, with which tokens see later ones, so that none can be generated,",
    )
    c.skip("num_image_tokens")
    return {"head_dim": c.count("head_dim"), "spans": spans, **biases(c)}


def _sandwich(c: HF, post: bool = True, **changes: Any) -> Block:
    mixer = attention(c, scale=c.number("query_pre_attn_scalar") ** -0.5, **_heads(c), **changes)
    around = sandwich if post else pre_norm
    return around(mixer, mlp(c, act=c.text("hidden_activation")), _norm(c))


def _scaled(c: HF, block: Block | Callable[[int], Block], norm: Norm, **changes: Any) -> Decoder:
    scale = c.count("hidden_size") ** 0.5
    return decoder(c, block, norm, embed_scale=scale, tied=tied_by_default(c), **changes)
