"""Specs that lack one feature each: an oracle test that passes for one of them does not test the feature."""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from quire.models.spec import (
    MLA,
    MLP,
    Attention,
    Block,
    Decoder,
    DeltaNet,
    KimiDelta,
    Lightning,
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


def _rotate_all(spec: Decoder) -> Decoder:
    """Layers without rotary embedding get the others'."""
    ropes = [b.mixer.rope for b in spec.blocks if isinstance(b.mixer, Attention) and b.mixer.rope]
    if not ropes:
        return spec
    return _everywhere(spec, Attention, lambda a: a if a.rope else replace(a, rope=ropes[0]))


def _unsaturated(act: str) -> str:
    return "relu" if act != "relu" else "silu"


DROPS: dict[type, dict[str, Change]] = {
    Norm: {
        "eps": _times("eps", 1e4),
        "bias": _set("bias", False),
        "weight": _set("weight", False),
        "offset": _set("offset", 0.0),
    },
    Rope: {
        "theta": _times("theta", 3.0),
        "interleaved": _flip("interleaved"),
        "scaling": _set("scaling", None),
    },
    Attention: {
        "rope": _set("rope", None),
        "bias": _set("bias", False),
        "out_bias": _set("out_bias", False),
        "qk_norm": _set("qk_norm", None),
        "norm_after_rope": lambda a: (
            _flip("norm_after_rope")(a) if a.qk_norm and a.qk_norm_span != "full" else a
        ),
        "window": _set("window", None),
        "window off by one": lambda a: replace(a, window=a.window + 1) if a.window else a,
        "scale": _set("scale", None),
        "softcap": _set("softcap", None),
        "sinks": _set("sinks", False),
        "gate": _set("gate", None),
    },
    MLA: {
        "scale": _set("scale", None),
        "gate": _set("gate", False),
        "rope": lambda m: replace(m, rope=None if m.rope else Rope(dim=m.rope_dim)),
    },
    DeltaNet: {"beta_scale": _set("beta_scale", 1.0)},
    KimiDelta: {"floor": lambda d: replace(d, floor=d.floor / 2) if d.floor else d},
    Lightning: {"rate": _times("rate", 2.0)},
    ShortConv: {"bias": _set("bias", False)},
    MLP: {"act": lambda m: replace(m, act=_unsaturated(m.act)), "bias": _set("bias", False)},
    MoE: {
        "top_k": lambda m: replace(m, top_k=m.top_k - 1),
        "renorm": _flip("renorm"),
        "scale": _set("scale", 1.0),
        "groups": lambda m: replace(m, groups=1, top_groups=1),
        "correction": _set("correction", False),
        "router_bias": _set("router_bias", False),
        "shared": lambda m: replace(m, shared=None, shared_gate=False),
        "shared_gate": _set("shared_gate", False),
    },
    Block: {
        "attn_post_norm": _set("attn_post_norm", None),
        "mlp_post_norm": _set("mlp_post_norm", None),
        "parallel": lambda b: _flip("parallel")(b) if b.mlp_norm and b.attn_norm else b,
        "residual_scale": _set("residual_scale", 1.0),
        "normed_residual": _set("normed_residual", None),
    },
    Decoder: {
        "embed_scale": _set("embed_scale", 1.0),
        "position_offset": _set("position_offset", 0),
        "head_bias": _set("head_bias", False),
        "logit_scale": _set("logit_scale", 1.0),
        "logit_softcap": _set("logit_softcap", None),
        "layers without rope": _rotate_all,
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
