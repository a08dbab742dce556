"""Specs that lack one feature each: an oracle test that passes for one of them does not test the feature."""

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from quire.models.spans import Spans
from quire.models.spec import (
    MLA,
    MLP,
    RGLRU,
    AltUp,
    Apart,
    Attention,
    Block,
    Both,
    Decoder,
    DeltaNet,
    Guided,
    Indexer,
    KimiDelta,
    LayerEmbedding,
    Lightning,
    Mamba,
    Mamba2,
    MoE,
    Norm,
    Rope,
    ShortConv,
)

Change = Callable[[Any], Any]  # a part of a spec -> the part without a feature; itself if it had none


def mutations(spec: Decoder) -> Iterator[tuple[str, Decoder]]:
    """Every feature of the spec by name, with the spec that lacks it.

    Each needs a subset of the spec's parameters, in the same shapes, so it loads from the same checkpoint.
    """
    for kind, drops in DROPS.items():
        for field, change in drops.items():
            changed = _everywhere(spec, kind, change)
            if changed != spec:
                yield f"{kind.__name__}.{field}", changed


def _set(field: str, value: object) -> Change:
    return lambda part: replace(part, **{field: value})


def _flip(field: str) -> Change:
    return lambda part: replace(part, **{field: not getattr(part, field)})


def _times(field: str, factor: float) -> Change:
    return lambda part: replace(part, **{field: getattr(part, field) * factor})


def _without_scale(i: int) -> Change:
    def change(part: Mamba2) -> Mamba2:
        scales = part.scales
        return replace(part, scales=(*scales[:i], 1.0, *scales[i + 1 :])) if scales else part

    return change


def _rotate_all(spec: Decoder) -> Decoder:
    """Layers without rotary embedding get the others'."""
    ropes = [b.mixer.rope for b in spec.blocks if isinstance(b.mixer, Attention) and b.mixer.rope]
    if not ropes:
        return spec
    return _everywhere(spec, Attention, lambda a: a if a.rope else replace(a, rope=ropes[0]))


def _taking_over(block: Block) -> Block:
    """A layer that sees what the first one has chosen."""
    mixer = block.mixer
    if not isinstance(mixer, MLA) or mixer.indexer is None:
        return block
    return replace(block, mixer=replace(mixer, indexer=replace(mixer.indexer, own=False)))


def _rotated_whole(attention: Attention) -> Attention:
    """Of heads that are rotated in part, all dimensions; factors by dimension are for a part only."""
    rope = attention.rope
    if rope is None or rope.dim == attention.head_dim or "long_factor" in (rope.scaling or {}):
        return attention
    return replace(attention, rope=replace(rope, dim=attention.head_dim, axes=None))


def _unsaturated(act: str) -> str:
    return "relu" if act != "relu" else "silu"


DROPS: dict[type, dict[str, Change]] = {
    Spans: {
        "tokens": lambda s: replace(s, tokens=(0,) if s.tokens is None else None),
        "wide": _flip("wide"),
    },
    Norm: {
        "kind": lambda n: replace(n, kind="rms" if n.kind == "layer" else "layer", bias=False),
        "eps": _times("eps", 1e4),
        "bias": _set("bias", False),
        "weight": _set("weight", False),
        "offset": _set("offset", 0.0),
    },
    Rope: {
        "theta": _times("theta", 3.0),
        "interleaved": _flip("interleaved"),
        "scaling": _set("scaling", None),
        "axes": _set("axes", None),
    },
    Attention: {
        "rope": _set("rope", None),
        "rope of a part": _rotated_whole,
        "bias": _set("bias", False),
        "out_bias": _set("out_bias", False),
        "qk_norm": _set("qk_norm", None),
        "q_rank_norm": _set("q_rank_norm", None),
        "norm_after_rope": lambda a: (
            _flip("norm_after_rope")(a) if a.qk_norm and a.qk_norm.weight and a.qk_norm_span != "full" else a
        ),
        "window": _set("window", None),
        "window off by one": lambda a: replace(a, window=a.window + 1) if a.window else a,
        "chunk": _set("chunk", None),
        "spans": _set("spans", None),
        "scale": _set("scale", None),
        "slopes": _set("slopes", None),
        "gate": _set("gate", None),
        "kind of gate": lambda a: (
            replace(a, gate={"sigmoid": "softplus"}.get(a.gate, "sigmoid")) if a.gate else a
        ),
        "growth": _set("growth", None),
        "growth off by one": lambda a: (
            replace(a, growth=replace(a.growth, first=1 - a.growth.first)) if a.growth else a
        ),
        "clip": _set("clip", None),
        "softcap": _set("softcap", None),
        "sinks": _set("sinks", False),
        "gate_bias": _set("gate_bias", False),
        "v_norm": _set("v_norm", None),
        "v_scale": _set("v_scale", 1.0),
        "shares": lambda a: replace(a, shares=a.shares - 2) if a.shares else a,  # another one of its shape
    },
    MLA: {
        "scale": _set("scale", None),
        "growth": _set("growth", None),
        "gate": _set("gate", False),
        "indexer": _set("indexer", None),
        "rope": lambda m: replace(m, rope=None if m.rope else Rope(dim=m.rope_dim)),
    },
    Indexer: {
        "top_k": lambda i: replace(i, top_k=i.top_k - 1),
        "rope": lambda i: replace(i, rope=replace(i.rope, theta=i.rope.theta * 3)),
        "pairs": lambda i: replace(i, rope=_flip("interleaved")(i.rope)),
        "norm": lambda i: replace(i, norm=replace(i.norm, kind="rms")),
    },
    DeltaNet: {"beta_scale": _set("beta_scale", 1.0)},
    KimiDelta: {"floor": lambda d: replace(d, floor=d.floor / 2) if d.floor else d},
    Lightning: {
        "rate": _times("rate", 2.0),
        "groups": _set("groups", 1),
        "activated": _flip("activated"),
        "qk_norm": _set("qk_norm", None),
        "rope": _set("rope", None),
        "scale": _set("scale", 1.0),
    },
    Mamba: {
        "bias": _set("bias", False),
        "conv_bias": _set("conv_bias", False),
        "norm": _set("norm", None),
    },
    Mamba2: {
        "bias": _set("bias", False),
        "conv_bias": _set("conv_bias", False),
        "time_step": _set("time_step", (0.0, math.inf)),
        "norm": _set("norm", None),
        "norm_first": lambda m: _flip("norm_first")(m) if m.norm else m,
        **{f"scales[{i}]": _without_scale(i) for i in range(5)},
    },
    RGLRU: {"act": lambda m: replace(m, act=_unsaturated(m.act))},
    Both: {
        "attention_scale": _set("attention_scale", 1.0),
        "states_scale": _set("states_scale", 1.0),
    },
    Guided: {
        "shared": _set("shared", 0),
        "qkv_rank": _set("qkv_rank", None),
        "up_rank": _set("up_rank", None),
    },
    ShortConv: {"bias": _set("bias", False)},
    MLP: {
        "act": lambda m: replace(m, act=_unsaturated(m.act)),
        "bias": _set("bias", False),
        "gate_scale": _set("gate_scale", 1.0),
        "limit": _set("limit", None),
        "out_scale": _set("out_scale", 1.0),
        "sparsity": _set("sparsity", 0.0),
        "more sparsity": lambda m: replace(m, sparsity=(1.0 + m.sparsity) / 2) if m.sparsity else m,
    },
    MoE: {
        "score": lambda m: replace(m, score="sigmoid" if m.score == "softmax" else "softmax"),
        "top_k": lambda m: replace(m, top_k=max(1, m.top_k - 1)),
        "renorm": _flip("renorm"),
        "scale": _set("scale", 1.0),
        "groups": lambda m: replace(m, groups=1, top_groups=1),
        "top_groups": lambda m: replace(m, top_groups=max(1, m.top_groups - 1)),
        "correction": _set("correction", False),
        "router_bias": _set("router_bias", False),
        "shared": lambda m: replace(m, shared=None, shared_gate=False),
        "shared_gate": _set("shared_gate", False),
        "apart": _set("apart", None),
        "weighs_inputs": _set("weighs_inputs", False),
    },
    AltUp: {
        "active": lambda a: replace(a, active=(a.active + 1) % a.num),
        "is_scaled": _flip("is_scaled"),
    },
    Apart: {"router_scale": _set("router_scale", 1.0)},
    LayerEmbedding: {"act": lambda e: replace(e, act=_unsaturated(e.act))},
    Block: {
        "attn_post_norm": _set("attn_post_norm", None),
        "mlp_post_norm": _set("mlp_post_norm", None),
        "parallel": lambda b: _flip("parallel")(b) if b.mlp_norm and b.attn_norm and not b.altup else b,
        "residual_scale": _set("residual_scale", 1.0),
        "normed_residual": _set("normed_residual", None),
        "embedding": _set("embedding", None),
        "scalar": _set("scalar", False),
    },
    Decoder: {
        "embed_scale": _set("embed_scale", 1.0),
        "embed_norm": _set("embed_norm", None),
        "sinusoids": _set("sinusoids", 0),
        "num_positions": _set("num_positions", 0),
        "position_offset": _set("position_offset", 0),
        "head_bias": _set("head_bias", False),
        "logit_scale": _set("logit_scale", 1.0),
        "logit_softcap": _set("logit_softcap", None),
        "layers without rope": _rotate_all,
        "indexers of layers": lambda d: replace(d, blocks=(d.blocks[0], *map(_taking_over, d.blocks[1:]))),
    },
}


def _everywhere(part: Any, kind: type, change: Change) -> Any:
    """Apply a change to every part of one kind, innermost first."""
    if isinstance(part, tuple):
        return tuple(_everywhere(item, kind, change) for item in part)
    if not is_dataclass(part):
        return part
    inner = {f.name: _everywhere(getattr(part, f.name), kind, change) for f in fields(part)}
    part = replace(part, **inner)
    return change(part) if isinstance(part, kind) else part
