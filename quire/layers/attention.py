"""Multi-head, grouped-query and multi-query attention over the paged cache."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quire.attention.base import LayerCache, Product, Ragged, Turn
from quire.errors import ConfigError
from quire.kernels import ops
from quire.layers.alibi import Slopes
from quire.layers.base import Build, Weights
from quire.layers.linear import Linear
from quire.layers.norm import Norm, Normed
from quire.layers.rope import grown
from quire.models import spec
from quire.parallel.axis import Axis


class Raised(nn.Module):
    """Queries of few numbers, normalised, in all their dimensions (multi-matrix factorization attention)."""

    def __init__(self, rank: int, outputs: int, norm: spec.Norm | None, build: Build):
        super().__init__()
        self.norm = Norm(norm, (rank,), build) if norm else None
        self.product = Linear(rank, {"q_b_proj": outputs}, build)

    def load(self, weights: Weights, name: str) -> None:
        if self.norm is not None:
            self.norm.load(weights, f"{name}.q_a_layernorm")
        self.product.load(weights, name)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, rank] -> [T, outputs]."""
        return self.product(x if self.norm is None else self.norm(x))


def chunk_of(mixer: spec.Mixer | None, build: Build) -> int | None:
    """The chunk of positions that a layer sees, if sequences may be longer."""
    s = spec.attention_of(mixer)
    chunk = s.chunk if isinstance(s, spec.Attention) else None
    return chunk if chunk is not None and chunk < build.ropes.num_positions else None


class Attention(nn.Module):
    """q, k, v in one product; norms and rotation; write; attend; output.

    RMS norms per head directly before a rotation are one operation with it; other norms run by themselves.
    """

    def __init__(self, s: spec.Attention, build: Build, axis: Axis | None = None):
        """`axis`: whose ranks have heads each."""
        super().__init__()
        self.spec, self.build = s, build
        q, found = s.num_heads * s.head_dim, s.num_heads * s.value_dim
        queries = {"q_a_proj": s.q_rank} if s.q_rank else {"q_proj": q}
        keys = {} if s.shares is not None else {"k_proj": s.num_kv_heads * s.head_dim}
        values = {"v_proj": s.num_kv_heads * s.value_dim} if keys and not s.keys_as_values else {}
        inputs = s.inputs or build.dim
        self.qkv = Linear(inputs, queries | keys | values, build, bias=s.bias)
        self.raised = Raised(s.q_rank, q, s.q_rank_norm, build) if s.q_rank else None
        self.out = Linear(found, {"o_proj": build.dim}, build, bias=s.out_bias, axis=axis)
        self.q_norm = self._qk_norm(s.num_heads, axis)
        self.k_norm = self._qk_norm(s.num_kv_heads, axis) if keys else None
        self.v_norm = Norm(s.v_norm, (s.head_dim,), build) if s.v_norm else None
        self.table = build.ropes.table(s.rope) if s.rope else None
        self.scale = s.head_dim**-0.5 if s.scale is None else s.scale
        self.slopes = self._slopes()
        self.chunk = chunk_of(s, build)
        self.sinks: Tensor | None = None
        rows = s.num_heads if s.gate_per_head else found
        self.gate = Linear(inputs, {"gate_proj": rows}, build, bias=s.gate_bias) if s.gate else None
        self.turn = self._turn()

    def load(self, weights: Weights, name: str) -> None:
        s = self.spec
        self.qkv.load(weights, name)
        if self.raised is not None:
            self.raised.load(weights, name)
        self.out.load(weights, name)
        if self.gate is not None:
            self.gate.load(weights, name)
        norms = {"q_norm": (self.q_norm, s.num_heads), "k_norm": (self.k_norm, s.num_kv_heads)}
        rows = []
        for part, (norm, num_heads) in norms.items():
            if norm is not None:
                norm.load(weights, f"{name}.{part}")
                rows.append(_head_weights(norm, num_heads))
        if self.turn is not None and s.qk_norm is not None:
            self.turn = replace(self.turn, weights=torch.cat(rows).to(self.build.device))
        if s.sinks:
            self.sinks = self.build.pull(weights, f"{name}.sinks", s.num_heads, dtype=torch.float32)

    def heads(self, x: Normed, step: Ragged, cache: LayerCache, more: Tensor | None = None) -> Tensor:
        """x [T, dim] -> what its heads found [T, H * D], which `out` takes.

        `more` is added to queries, keys and values, side by side.
        """
        y = self._attend(x, step, cache, more)
        if self.gate is not None:
            gate = self.gate.of(x, torch.float32)
            gate = ops.softplus(gate) if self.spec.gate == "softplus" else ops.act(gate, "sigmoid")
            y = (y * gate.unflatten(-1, (self.spec.num_heads, -1))).to(y.dtype)
        return y.flatten(1)

    def _attend(self, x: Normed, step: Ragged, cache: LayerCache, more: Tensor | None) -> Tensor:
        """x [T, dim] -> [T, H, D]."""
        s, backend = self.spec, self.build.backend
        step = step.seen_by(cache, self.chunk, s.spans)
        how: Any = {"scale": self.scale, "window": s.window, "softcap": s.softcap, "sinks": self.sinks}
        turn = self._turn_of(step)
        if turn is not None and self._is_one_product() and more is None:
            product = Product(x.values, x.scale, self.qkv.weight, self.qkv.bias, s.head_dim)
            return backend.attend_product(product, cache, turn, step, **how)
        qk, v = self._heads(x, more)
        if s.shares is not None:
            q, _ = self._place(qk, step)
        else:
            # Before keys are turned, perhaps in place.
            v = self._values(qk[:, s.num_heads :] if s.keys_as_values else v)
            q, k = self._place(qk, step)
            if self.slopes is not None:
                q, k = self.slopes.queries(q), self.slopes.keys(k, step.positions)
            backend.write(cache, k, v, step)
        return backend.attend(grown(q, s.growth, step.positions), cache, step, **how)

    def _is_one_product(self) -> bool:
        """Whether queries, keys and values are heads of one size, which are cached as the product makes them."""
        s = self.spec
        is_value = s.v_dim is None and s.v_scale == 1.0 and s.v_norm is None and not s.keys_as_values
        return is_value and s.shares is None and self.raised is None

    def _values(self, v: Tensor) -> Tensor:
        """v [T, Hkv, Dv], which may be keys, as they are cached."""
        s = self.spec
        if self.v_norm is not None:
            v = self.v_norm(v)
        elif s.keys_as_values:
            v = v.clone()
        return self._clip(v if s.v_scale == 1.0 else v * s.v_scale)

    def _heads(self, x: Normed, more: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [T, dim] -> queries, and keys if it has any [T, H or H + Hkv, D]; and values [T, Hkv or 0, Dv]."""
        s, y = self.spec, self.qkv.of(x)
        if self.raised is not None and s.q_rank:
            low, others = y.tensor_split((s.q_rank,), -1)
            y = torch.cat((self.raised(low), others), -1)
        y = y if more is None else y + more
        qk, v = y.tensor_split((y.shape[-1] - self.qkv.parts.get("v_proj", 0),), -1)
        return qk.unflatten(-1, (-1, s.head_dim)), v.unflatten(-1, (-1, s.value_dim))

    def _slopes(self) -> Slopes | None:
        """
        Raises:
            ConfigError: the cache is of int8, whose one scale of a key is too coarse for positions.
        """
        s, build = self.spec, self.build
        if s.slopes is None:
            return None
        if build.backend.quantized:
            raise ConfigError(
                "kv_cache_dtype is int8, and keys of this network hold positions (ALiBi), which 8 bits are too few"
                " for; leave it auto"
            )
        return Slopes(s.slopes, self.scale, build.dtype, build.device)

    def _turn(self) -> Turn | None:
        """The norms and the rotation, where they are one operation; norms have no weights yet."""
        s, norm = self.spec, self.spec.qk_norm
        if s.clip is not None or s.growth is not None or s.slopes is not None:
            return None
        per_head = norm is not None and norm.kind == "rms" and not norm.bias and s.qk_norm_span != "full"
        if s.rope is None or self.table is None or (norm is not None and (s.norm_after_rope or not per_head)):
            return None
        return Turn(*self.table, s.rope.interleaved, eps=norm.eps if norm else 0.0)

    def _rows(self, step: Ragged) -> tuple[Tensor, Tensor, Tensor] | None:
        """Cosines and sines, and which of their rows are the step's [T]; None without rotation."""
        if self.spec.rope is None or self.table is None:
            return None
        if step.coordinates is None:
            return *self.table, step.positions
        return self.build.ropes.rows(self.table, step.coordinates)

    def _turn_of(self, step: Ragged) -> Turn | None:
        """`turn` by the step's own coordinates, if it has any."""
        if self.turn is None or step.coordinates is None or (rows := self._rows(step)) is None:
            return self.turn
        cos, sin, at = rows
        return replace(self.turn, cos=cos, sin=sin, at=at)

    def _place(self, qk: Tensor, step: Ragged) -> tuple[Tensor, Tensor]:
        """Normalise and rotate qk [T, H + Hkv, D], or queries only, in whatever order."""
        s, turn = self.spec, self._turn_of(step)
        if turn is not None:
            qk = turn.applied(qk, step)
        else:
            if not s.norm_after_rope:
                qk = self._norm(qk)
            qk = self._clip(qk)
            if s.rope is not None and (rows := self._rows(step)) is not None:
                qk = ops.norm_rope(qk, None, 0.0, *rows, s.rope.interleaved)
            if s.norm_after_rope:
                qk = self._norm(qk)
        return qk[:, : s.num_heads], qk[:, s.num_heads :]

    def _clip(self, x: Tensor) -> Tensor:
        return x if self.spec.clip is None else x.clamp(-self.spec.clip, self.spec.clip)

    def _norm(self, qk: Tensor) -> Tensor:
        s = self.spec
        parts = []
        for norm, x in ((self.q_norm, qk[:, : s.num_heads]), (self.k_norm, qk[:, s.num_heads :])):
            if norm is not None:
                x = norm(x.flatten(1) if s.qk_norm_span == "full" else x)
                parts.append(x.view(len(qk), -1, s.head_dim))
        return torch.cat(parts, 1) if parts else qk

    def _qk_norm(self, num_heads: int, axis: Axis | None) -> Norm | None:
        s = self.spec
        if s.qk_norm is None:
            return None
        spans = {
            "head": (s.head_dim,),
            "full": (num_heads * s.head_dim,),
            "heads": (num_heads, s.head_dim),
        }
        spread = axis if s.qk_norm_span == "full" else None
        return Norm(s.qk_norm, spans[s.qk_norm_span], self.build, spread)


def _head_weights(norm: Norm, num_heads: int) -> Tensor:
    """A norm's weight and offset as [num_heads, D] float32."""
    dim = norm.shape[-1]
    if norm.weight is None:
        return torch.ones(num_heads, dim)
    return (norm.weight.float() + norm.spec.offset).expand(num_heads, dim)
