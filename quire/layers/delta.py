"""Mixers whose heads keep a matrix that forgets and that keys correct: gated DeltaNet, Kimi delta attention."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from quire.attention.base import Ragged
from quire.attention.states import State
from quire.kernels import ops
from quire.layers.base import Build, Weights
from quire.layers.conv import Conv
from quire.layers.linear import EXACT, Linear
from quire.layers.norm import Norm, Normed
from quire.models import spec
from quire.models.parameters import a_log_shape
from quire.parallel.axis import Axis

L2_EPS = 1e-6


class Directions(nn.Module):
    """q, k and v after their convolution: queries and keys of length 1, queries scaled besides."""

    def __init__(self, parts: Mapping[str, int], k_dim: int, width: int, build: Build):
        super().__init__()
        self.parts, self.k_dim = dict(parts), k_dim
        self.conv = Conv(sum(parts.values()), width, build, bias=False, silu=True)
        # A vector of length 1 is one of RMS 1 by the root of its size.
        self.lengths = [torch.full((k_dim,), k_dim**power, device=build.device) for power in (-1.0, -0.5)]

    def load(self, weights: Weights, name: str) -> None:
        conv = self.conv
        pulled = [
            conv.build.pull(weights, f"{name}.{part}_conv1d.weight", size, 1, conv.width)
            for part, size in self.parts.items()
        ]
        conv.weight = torch.cat(pulled)[:, 0]

    def forward(self, x: Tensor, step: Ragged, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, q, k and v] -> q and k [T, Hk, Dk] float32, v [T, sum of values]."""
        q, k, v = self.conv(x, step, state).split(list(self.parts.values()), -1)
        q, k = (
            ops.rms_norm(part.float().unflatten(-1, (-1, self.k_dim)), length, L2_EPS / self.k_dim)
            for part, length in zip((q, k), self.lengths, strict=True)
        )
        return q, k, v


class DeltaNet(nn.Module):
    """q, k, v and the gate in one product; convolve; recur; norm, gate; output."""

    def __init__(self, s: spec.DeltaNet, build: Build, axis: Axis | None = None):
        super().__init__()
        self.spec, self.build = s, build
        keys, values = s.num_k_heads * s.k_dim, s.num_v_heads * s.v_dim
        self.sizes = 2 * keys + values, values
        parts = {"q": keys, "k": keys, "v": values}
        self.into = Linear(build.dim, {f"{p}_proj": n for p, n in (parts | {"g": values}).items()}, build)
        self.rates = Linear(
            build.dim, {"b_proj": s.num_v_heads, "a_proj": s.num_v_heads}, build, least_bits=EXACT
        )
        self.directions = Directions(parts, s.k_dim, s.width, build)
        self.norm = Norm(s.norm, (s.v_dim,), build)
        self.out = Linear(values, {"o_proj": build.dim}, build, axis=axis)
        self.speed: Any = None  # once loaded, [Hv] float32, negative
        self.dt_bias: Any = None  # [Hv] float32

    def load(self, weights: Weights, name: str) -> None:
        size = self.spec.num_v_heads
        for part in (self.into, self.rates, self.directions, self.out):
            part.load(weights, name)
        self.norm.load(weights, f"{name}.o_norm")
        self.speed = speed(self.build, weights, name, size)
        self.dt_bias = self.build.pull(weights, f"{name}.dt_bias", size, dtype=torch.float32)

    def heads(self, x: Normed, step: Ragged, cache: State) -> Tensor:
        """x [T, dim] -> what its heads found [T, Hv * Dv], which `out` takes."""
        s = self.spec
        qkv, gate = self.into.of(x).split(self.sizes, -1)
        q, k, v = self.directions(qkv, step, cache[0])
        beta, a = self.rates.of(x, torch.float32).chunk(2, -1)
        beta = ops.act(beta, "sigmoid") * s.beta_scale
        decay = torch.exp(self.speed * ops.softplus(a + self.dt_bias))
        y = ops.recurrence(
            *(v.unflatten(-1, (-1, s.v_dim)), q, k, decay[..., None], beta),
            *(cache[1], step.rows, step.query_starts, self.build.in_chunks),
        )
        return gated(self.norm(y), gate)


class KimiDelta(nn.Module):
    """As DeltaNet, but a rate for each dimension of a key; rates and gate in one product or two each."""

    def __init__(self, s: spec.KimiDelta, build: Build, axis: Axis | None = None):
        super().__init__()
        self.spec, self.build = s, build
        self.size, inner = s.num_heads * s.head_dim, "_a" if s.rank else ""
        self.between = s.rank or self.size
        parts = dict.fromkeys("qkv", self.size)
        both = {f"{p}_proj": self.size for p in parts} | {f"g{inner}_proj": self.between}
        few = {"b_proj": s.num_heads, f"f{inner}_proj": self.between}
        self.into, self.rates = (
            Linear(build.dim, both, build),
            Linear(build.dim, few, build, least_bits=EXACT),
        )
        self.gate_up = Linear(s.rank, {"g_b_proj": self.size}, build) if s.rank else None
        self.rate_up = Linear(s.rank, {"f_b_proj": self.size}, build, least_bits=EXACT) if s.rank else None
        self.directions = Directions(parts, s.head_dim, s.width, build)
        self.norm = Norm(s.norm, (s.head_dim,), build)
        self.out = Linear(self.size, {"o_proj": build.dim}, build, axis=axis)
        self.speed: Any = None  # once loaded, [H, 1] float32, negative
        self.dt_bias: Any = None  # [H * D] float32

    def load(self, weights: Weights, name: str) -> None:
        for part in (self.into, self.rates, self.gate_up, self.rate_up, self.directions, self.out):
            if part is not None:
                part.load(weights, name)
        self.norm.load(weights, f"{name}.o_norm")
        self.speed = speed(self.build, weights, name, *a_log_shape(self.spec)).view(-1, 1)
        self.dt_bias = self.build.pull(weights, f"{name}.dt_bias", self.size, dtype=torch.float32)

    def heads(self, x: Normed, step: Ragged, cache: State) -> Tensor:
        """x [T, dim] -> what its heads found [T, H * D], which `out` takes."""
        s = self.spec
        qkv, gate = self.into.of(x).split((3 * self.size, self.between), -1)
        q, k, v = self.directions(qkv, step, cache[0])
        beta, rate = self.rates.of(x).split((s.num_heads, self.between), -1)
        if self.gate_up is not None and self.rate_up is not None:
            gate, rate = self.gate_up(gate), self.rate_up(rate, torch.float32)
        y = ops.recurrence(
            *(v.unflatten(-1, (-1, s.head_dim)), q, k, self._decay(rate), ops.act(beta.float(), "sigmoid")),
            *(cache[1], step.rows, step.query_starts),
        )
        return self.norm(y).flatten(1) * ops.act(gate, "sigmoid")

    def _decay(self, rate: Tensor) -> Tensor:
        """rate [T, H * D] -> [T, H, D] float32."""
        rate = (rate.float() + self.dt_bias).unflatten(-1, (self.spec.num_heads, -1))
        if self.spec.floor is None:
            return torch.exp(self.speed * ops.softplus(rate))
        return torch.exp(self.spec.floor * ops.act(-self.speed * rate, "sigmoid"))


def speed(build: Build, weights: Weights, name: str, *shape: int) -> Tensor:
    """How fast heads forget, as a factor on what the input says of it: -exp(A_log), float32."""
    return -torch.exp(build.pull(weights, f"{name}.A_log", *shape, dtype=torch.float32))


def gated(y: Tensor, gate: Tensor) -> Tensor:
    """y [T, H, D] * silu(gate [T, H * D]) -> [T, H * D]."""
    return cast(Tensor, ops.act_mul(torch.cat((gate, y.flatten(1)), -1), "silu"))
