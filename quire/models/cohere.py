"""Command R, R+, R7B and A, and with experts: parallel sublayers behind one norm without bias, scaled logits."""

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
from quire.models.deepseek import RENAMES, dense_layers
from quire.models.hf import HF
from quire.models.names import LLAMA, Names
from quire.models.spec import Attention, Block, Decoder, MoE, Norm


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


def cohere2_moe(c: HF) -> tuple[Decoder, Names]:
    """The first layers may be dense, and then have a width and a pattern of local layers of their own."""
    c.skip(
        "rope_theta", "layer_norm_eps"
    )  # rope_parameters repeat one; rms_norm_eps takes the place of the other
    norm = Norm(eps=c.rms_norm_eps) if c.rms_norm_eps is not None else _norm(c)
    first = c.get("first_k_dense_replace", 0)
    prefix, pattern = c.get("prefix_dense_sliding_window_pattern", 1), c.get("sliding_window_pattern", 4)
    local = layer_types(c, lambda i: (i + 1) % prefix != 0 if i < first else (i - first + 1) % pattern != 0)
    is_dense, size = dense_layers(c, usual=0), c.count("head_dim")
    moe, rotary = _experts(c), rope(c, size, interleaved=True)
    dense = mlp(c, hidden=c.prefix_dense_intermediate_size)

    def block(i: int) -> Block:
        turned = (local[i] and window(c)) or (is_dense[i] and prefix == 1)
        own = {"rope": rotary if turned else None, "window": window(c, local[i]), **_heads(c)}
        mixer = attention(c, head_dim=size, **own)
        part = dense if is_dense[i] else moe
        return Block(mixer=mixer, mlp=part, attn_norm=norm, mlp_norm=None, parallel=True)

    return decoder(c, block, norm, **_head(c)), Names(renames=RENAMES)


def _experts(c: HF) -> MoE:
    """Softmax or sigmoid of the chosen logits, which is that of all, renormalised."""
    score, count = c.get("expert_selection_fn", "softmax"), c.get("num_shared_experts", 0)
    c.refuse(score not in ("softmax", "sigmoid"), f"expert_selection_fn={score!r}")
    strategy = c.get("shared_expert_combination_strategy", "average")
    c.refuse(count > 0 and strategy != "sum", f"shared_expert_combination_strategy={strategy!r}")
    hidden = c.count("intermediate_size")
    return MoE(
        num_experts=c.count("num_experts", "num_local_experts"),
        top_k=c.count("num_experts_per_tok"),
        expert=mlp(c),
        score=score,
        renorm=bool(c.get("norm_topk_prob", True)) or score == "softmax",
        shared=mlp(c, hidden=hidden * count) if count else None,
    )


def _heads(c: HF) -> dict[str, Any]:
    return {"num_kv_heads": kv_heads(c), **biases(c)}


def _norm(c: HF) -> Norm:
    return Norm(kind="layer", eps=c.number("layer_norm_eps"))


def _parallel(c: HF, mixer: Attention) -> Block:
    return Block(mixer=mixer, mlp=mlp(c), attn_norm=_norm(c), mlp_norm=None, parallel=True)


def _head(c: HF) -> dict[str, float]:
    return {"logit_scale": c.number("logit_scale"), "tied": tied_by_default(c)}
