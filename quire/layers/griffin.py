"""Griffin's recurrent block (De et al. 2024)."""

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

SHARPNESS = 8.0  # of the recurrent gate


class Gate(nn.Module):
    """sigmoid(x W + b), for each head by itself. Float32 results."""

    def __init__(self, num_heads: int, size: int, build: Build):
        super().__init__()
        self.num_heads, self.size, self.build = num_heads, size, build
        self.weight: Any = None  # what `ops.pack_linear` made of [num_heads, size, size]
        self.bias: Any = None  # [num_heads, size] float32

    def load(self, weights: Weights, name: str) -> None:
        build, heads, size = self.build, self.num_heads, self.size
        weight = build.pull(weights, f"{name}_weight", heads, size, size)
        self.weight = build.pack(weight.transpose(1, 2).contiguous())  # checkpoints have inputs first
        self.bias = build.pull(weights, f"{name}_bias", heads, size, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, num_heads * size] -> the same shape."""
        heads = ops.linear(x.unflatten(-1, (self.num_heads, self.size)), self.weight, None, torch.float32)
        gates: Tensor = ops.act((heads + self.bias).flatten(1), "sigmoid")
        return gates


class RGLRU(nn.Module):
    """x and gate y in one product; convolve x; a recurrence of each channel; gate; output."""

    def __init__(self, s: spec.RGLRU, build: Build):
        super().__init__()
        self.spec, self.build = s, build
        self.into = Linear(build.dim, {"linear_x": s.channels, "linear_y": s.channels}, build, bias=True)
        self.conv = Conv(s.channels, s.width, build, bias=True)
        size = s.channels // s.num_heads
        self.input, self.keep = Gate(s.num_heads, size, build), Gate(s.num_heads, size, build)
        self.out = Linear(s.channels, {"linear_out": build.dim}, build, bias=True)
        self.rate: Any = None  # [channels] float32, negative

    def load(self, weights: Weights, name: str) -> None:
        self.into.load(weights, name)
        self.conv.load(weights, f"{name}.conv_1d")
        self.input.load(weights, f"{name}.rg_lru.input_gate")
        self.keep.load(weights, f"{name}.rg_lru.recurrent_gate")
        self.out.load(weights, name)
        key = f"{name}.rg_lru.recurrent_param"
        self.rate = -SHARPNESS * F.softplus(
            self.build.pull(weights, key, self.spec.channels, dtype=torch.float32)
        )

    def heads(self, x: Normed, step: Ragged, cache: State) -> Tensor:
        """x [T, dim] -> what `out` takes [T, channels]."""
        seen, state = cache
        mixed, y = self.into.of(x).chunk(2, -1)
        mixed = self.conv(mixed, step, seen)
        log_decay = self.rate * self.keep(mixed)
        # What decays makes room for what comes in; before a sequence's first position there is nothing.
        room = torch.where(step.positions[:, None] == 0, 1.0, torch.sqrt(-torch.expm1(2 * log_decay)))
        values, one = (
            mixed.float() * self.input(mixed) * room,
            torch.ones(len(mixed), 1, 1, device=mixed.device),
        )
        decay = log_decay.exp()[..., None]
        found = ops.recurrence(values[..., None], one, one, decay, None, state, step.rows, step.query_starts)
        return (ops.act(y.contiguous(), self.spec.act).float() * found[..., 0]).to(y.dtype)
