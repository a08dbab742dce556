"""State-space mixers: Mamba (Gu and Dao 2023), Mamba-2 (Dao and Gu 2024).

From the convolution's result to the output's product everything is float32.
"""

from typing import Any

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
from quire.parallel.axis import Axis


class Mamba(nn.Module):
    """Values and gate in one product; convolve; each head scans its channels; gate; output."""

    def __init__(self, s: spec.Mamba, build: Build):
        super().__init__()
        self.spec = s
        parts = {"value_proj": s.channels, "gate_proj": s.channels}
        self.into = Linear(build.dim, parts, build, bias=s.bias)
        self.conv = Conv(s.channels, s.width, build, bias=s.conv_bias, silu=True)
        self.scans = [Scan(s, build) for _ in range(s.num_heads)]
        self.out = Linear(s.channels, {"out_proj": build.dim}, build, bias=s.bias)

    def load(self, weights: Weights, name: str) -> None:
        self.into.load(weights, name)
        self.conv.load(weights, f"{name}.conv1d")
        for i, scan in enumerate(self.scans):
            scan.load(weights, f"{name}.heads.{i}")
        self.out.load(weights, name)

    def heads(self, x: Normed, step: Ragged, cache: State) -> Tensor:
        """x [T, dim] -> what `out` takes [T, channels]."""
        seen, state = cache
        mixed, gate = self.into.of(x).chunk(2, -1)
        values = self.conv(mixed, step, seen).split(self.spec.head_dim, -1)
        made = [
            scan(part, step, state[:, i])
            for i, (scan, part) in enumerate(zip(self.scans, values, strict=True))
        ]
        y = made[0] if len(made) == 1 else torch.cat(made, -1)
        return (y * ops.act(gate.float(), "silu")).to(gate.dtype)


class Scan(nn.Module):
    """A head of Mamba: time steps, B and C in one product of its channels; scan."""

    def __init__(self, s: spec.Mamba, build: Build):
        super().__init__()
        self.spec, self.build = s, build
        self.sizes = {"dt": s.step_rank, "b": s.state_dim, "c": s.state_dim}
        chosen = sum(self.sizes.values())
        self.choose = Linear(s.head_dim, {"x_proj": chosen}, build, least_bits=EXACT)
        self.steps = Linear(s.step_rank, {"dt_proj": s.head_dim}, build, bias=True, least_bits=EXACT)
        self.norms = [Norm(s.norm, (size,), build) for size in self.sizes.values()] if s.norm else None
        self.rate: Tensor | None = None  # [state_dim, head_dim], A: negative
        self.skip: Tensor | None = None  # [head_dim], D

    def load(self, weights: Weights, name: str) -> None:
        s, build = self.spec, self.build
        for product in (self.choose, self.steps):
            product.load(weights, name)
        for part, norm in zip(self.sizes, self.norms or (), strict=False):
            norm.load(weights, f"{name}.{part}_layernorm")
        logs = build.pull(weights, f"{name}.A_log", s.head_dim, s.state_dim, dtype=torch.float32)
        self.rate = -logs.exp().T.contiguous()
        self.skip = build.pull(weights, f"{name}.D", s.head_dim, dtype=torch.float32)

    def forward(self, values: Tensor, step: Ragged, state: Tensor) -> Tensor:
        """values [T, head_dim], state [num_rows, state_dim, head_dim] -> [T, head_dim] float32."""
        chosen = self.choose(values).split(list(self.sizes.values()), -1)
        if self.norms:
            chosen = [norm(part) for norm, part in zip(self.norms, chosen, strict=True)]
        dt, b, c = chosen
        dt = ops.softplus(self.steps(dt, torch.float32))
        inputs = values.float(), dt, self.rate, b.float(), c.float(), self.skip
        y: Tensor = ops.selective_scan(*inputs, state, step.rows, step.query_starts)
        return y


class Mamba2(nn.Module):
    """Gate, values, keys (B), queries (C) and time steps in one product; convolve; recurrence; gate; norm; output."""

    def __init__(self, s: spec.Mamba2, build: Build, axis: Axis | None = None):
        super().__init__()
        self.spec, self.build = s, build
        self.into = Linear(build.dim, {"in_proj": s.inner + s.convolved + s.num_heads}, build, bias=s.bias)
        self.conv = Conv(s.convolved, s.width, build, bias=s.conv_bias, silu=True)
        self.out = Linear(s.inner, {"out_proj": build.dim}, build, bias=s.bias, axis=axis)
        self.rate: Any = None  # [num_heads, 1], A: negative
        self.skip: Any = None  # [num_heads, 1], D
        self.step_bias: Any = None  # [num_heads]
        self.gain: Tensor | None = None  # [groups, inner / groups], the norm's weight
        self.scales: Tensor | None = None  # of what `into` makes
        if s.scales:
            written = s.groups * s.state_dim
            sizes = torch.tensor([s.inner, s.inner, written, written, s.num_heads])
            scales = torch.tensor(s.scales, dtype=build.dtype).repeat_interleave(sizes)
            self.scales = scales.to(build.device)

    def load(self, weights: Weights, name: str) -> None:
        s = self.spec

        def exact(part: str, size: int) -> Tensor:
            return self.build.pull(weights, f"{name}.{part}", size, dtype=torch.float32)

        self.into.load(weights, name)
        self.conv.load(weights, f"{name}.conv1d")
        self.out.load(weights, name)
        self.rate = -exact("A_log", s.num_heads).exp()[:, None]
        self.skip = exact("D", s.num_heads)[:, None]
        self.step_bias = exact("dt_bias", s.num_heads)
        if s.norm and s.norm.weight:
            self.gain = exact("norm.weight", s.inner).unflatten(0, (s.groups, -1))

    def heads(self, x: Normed, step: Ragged, cache: State) -> Tensor:
        """x [T, dim] -> what `out` takes [T, inner]."""
        s, (seen, state) = self.spec, cache
        written = s.groups * s.state_dim
        made = self.into.of(x)
        made = made if self.scales is None else made * self.scales
        gate, mixed, dt = made.split([s.inner, s.convolved, s.num_heads], -1)
        convolved = self.conv(mixed, step, seen).float()
        values, keys, queries = convolved.split([s.inner, written, written], -1)
        values = values.unflatten(-1, (s.num_heads, s.head_dim))
        keys, queries = (part.unflatten(-1, (s.groups, s.state_dim)) for part in (keys, queries))
        dt = ops.softplus(dt.float() + self.step_bias).clamp(*s.time_step)[..., None]
        decay = (dt * self.rate).exp()
        y = ops.recurrence(
            *(values * dt, queries, keys, decay, None),
            *(state, step.rows, step.query_starts, self.build.in_chunks),
        )
        y, gate_by = (y + self.skip * values).flatten(-2), ops.act(gate.float(), "silu")
        y = self._norm(y) * gate_by if s.norm_first else self._norm(y * gate_by)
        return y.to(gate.dtype)

    def _norm(self, y: Tensor) -> Tensor:
        """y [T, inner], of each group by itself."""
        norm, groups = self.spec.norm, self.spec.groups
        if norm is None:
            return y
        return ops.rms_norm(y.unflatten(-1, (groups, -1)), self.gain, norm.eps, norm.offset).flatten(-2)
