"""State-space mixers: Mamba-2 (Dao and Gu 2024)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quire.attention.base import Ragged
from quire.attention.states import State
from quire.kernels import ops
from quire.layers.base import Build, Weights
from quire.layers.conv import Conv
from quire.layers.linear import Linear
from quire.layers.norm import Normed
from quire.models import spec


class Mamba2(nn.Module):
    """Gate, values, keys (B), queries (C) and time steps in one product; convolve; recurrence; gate; norm; output.

    From the convolution's result to the norm's everything is float32.
    """

    def __init__(self, s: spec.Mamba2, build: Build):
        super().__init__()
        self.spec, self.build = s, build
        self.into = Linear(build.dim, {"in_proj": s.inner + s.convolved + s.num_heads}, build, bias=s.bias)
        self.conv = Conv(s.convolved, s.width, build, bias=s.conv_bias, silu=True)
        self.out = Linear(s.inner, {"out_proj": build.dim}, build, bias=s.bias)
        self.rate: Any = None  # [num_heads, 1], A: negative
        self.skip: Any = None  # [num_heads, 1], D
        self.step_bias: Any = None  # [num_heads]
        self.gain: Tensor | None = None  # [groups, inner / groups], the norm's weight

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
        if s.norm.weight:
            self.gain = exact("norm.weight", s.inner).unflatten(0, (s.groups, -1))

    def heads(self, x: Normed, step: Ragged, cache: State) -> Tensor:
        """x [T, dim] -> what `out` takes [T, inner]."""
        s, (seen, state) = self.spec, cache
        written = s.groups * s.state_dim
        gate, mixed, dt = self.into.of(x).split([s.inner, s.convolved, s.num_heads], -1)
        convolved = self.conv(mixed, step, seen).float()
        values, keys, queries = convolved.split([s.inner, written, written], -1)
        values = values.unflatten(-1, (s.num_heads, s.head_dim))
        keys, queries = (part.unflatten(-1, (s.groups, s.state_dim)) for part in (keys, queries))
        dt = F.softplus(dt.float() + self.step_bias).clamp(*s.time_step)[..., None]
        decay = (dt * self.rate).exp()
        y = ops.recurrence(values * dt, queries, keys, decay, None, state, step.rows, step.query_starts)
        y = (y + self.skip * values).flatten(-2) * F.silu(gate.float())
        y = ops.rms_norm(y.unflatten(-1, (s.groups, -1)), self.gain, s.norm.eps, s.norm.offset)
        return y.flatten(-2).to(gate.dtype)
