"""The attention function that Transformers' modules call here. What a call does is up to who runs the network.

Modules call it in the same order in every forward pass; the number of a call says which layer's cache is meant, not
`layer_idx`, which some networks use twice and some not at all.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quire.attention.base import Backend, LayerCache, Ragged
from quire.errors import UnsupportedModel
from quire.models.spans import Spans
from quire.models.spec import Heads

NAME = "quire"


@dataclass(frozen=True, slots=True)
class Call:
    """One layer's queries [T, H, Dk], keys [T, Hkv, Dk] and values [T, Hkv, Dv], rotated, and how they meet."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    v_in_k: bool  # values are the beginnings of keys


class Attends(Protocol):
    """Who runs the network."""

    def attend(self, call: Call) -> Tensor:
        """[T, H, Dv]."""


_running: ContextVar[Attends] = ContextVar("running")


@contextmanager
def running(who: Attends) -> Iterator[None]:
    """Calls of the modules that are run inside go to `who`."""
    token = _running.set(who)
    try:
        yield
    finally:
        _running.reset(token)


@dataclass(slots=True)
class Paged:
    """Attention over the caches of one step."""

    backend: Backend
    caches: Sequence[LayerCache]
    step: Ragged
    spans: Spans | None = None
    number: int = 0

    def attend(self, call: Call) -> Tensor:
        cache = self.caches[self.number]
        self.number += 1
        step = self.step.seen_by(cache, None, self.spans)
        self.backend.write(cache, call.k, None if call.v_in_k else call.v, step)
        how: Any = {"scale": call.scale, "window": call.window, "softcap": call.softcap, "sinks": call.sinks}
        return self.backend.attend(call.q, cache, step, **how)


@dataclass(slots=True)
class Shapes:
    """Computes nothing and remembers what a cache would have to hold."""

    heads: list[Heads] = field(default_factory=list)

    def attend(self, call: Call) -> Tensor:
        num_heads, k_dim = call.q.shape[1:]
        num_kv_heads, v_dim = call.v.shape[1:]
        if call.sinks is not None and len(call.sinks) != num_heads:
            raise UnsupportedModel(f"{len(call.sinks)} sinks of {num_heads} heads")
        self.heads.append(
            Heads(
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                k_dim=k_dim,
                v_dim=v_dim,
                window=call.window,
                softcap=call.softcap,
                sinks=call.sinks is not None,
                v_in_k=call.v_in_k,
            )
        )
        return call.q.new_zeros(len(call.q), num_heads, v_dim)


def attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, Dk]
    key: Tensor,  # [1, Hkv, T, Dk]
    value: Tensor,  # [1, Hkv, T, Dv]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **more: Any,  # windows and sinks, where there are, and what training and other caches need
) -> tuple[Tensor, None]:
    """As Transformers' attention interface has it -> ([1, T, H, Dv], no weights)."""
    if attention_mask is not None:
        raise UnsupportedModel(f"{type(module).__name__} brings an attention mask of its own")
    if is_causal is False:
        raise UnsupportedModel(f"{type(module).__name__} is not causal")
    sinks = more.get("s_aux", more.get("sinks"))
    latent = vars(module).get("expand_kv")  # which is its own method unless latents are kept
    q = query[0].transpose(0, 1)
    call = Call(
        q=(latent.absorb(q) if latent else q).contiguous(),
        k=key[0].transpose(0, 1).contiguous(),
        v=value[0].transpose(0, 1).contiguous(),
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=more.get("sliding_window") or _window(module, "sliding_window" in more),
        softcap=softcap or None,
        sinks=None if sinks is None else sinks.flatten().to(torch.float32),
        v_in_k=latent is not None,
    )
    found = _running.get().attend(call)
    return (latent.expand(found) if latent else found)[None], None


def _window(module: nn.Module, told: bool) -> int | None:
    """Of a layer that leaves its window to a mask, which nobody makes here; `told`: it says itself that it has none."""
    known = vars(module)
    config, number = known.get("config"), known.get("layer_idx")
    values, own = ({}, {}) if config is None else (vars(config), config.attribute_map)
    types, window = (values.get(own.get(name, name)) for name in ("layer_types", "sliding_window"))
    if not types or not isinstance(number, int) or number >= len(types):
        return None if told or types else window
    if types[number] == "chunked_attention":
        raise UnsupportedModel("layers of chunked_attention have no kernel")
    return window if types[number] == "sliding_attention" else None


def register() -> None:
    """Make `attention` known to Transformers by its name, under which no masks are made."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)
