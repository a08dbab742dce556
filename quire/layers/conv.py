"""A gated short convolution (LFM2)."""

from typing import cast

from torch import Tensor, nn

from quire.attention.base import Ragged
from quire.attention.states import State
from quire.kernels import ops
from quire.layers.base import Build, Weights
from quire.layers.linear import Linear
from quire.layers.norm import Normed
from quire.models import spec


class Conv(nn.Module):
    """A causal convolution over each of `channels` by itself. Its state is the inputs that later positions see."""

    def __init__(self, channels: int, width: int, build: Build, *, bias: bool, silu: bool = False):
        super().__init__()
        self.channels, self.width, self.build, self.silu = channels, width, build, silu
        self.has_bias = bias
        self.weight: Tensor | None = None  # [channels, width]
        self.bias: Tensor | None = None

    def load(self, weights: Weights, name: str) -> None:
        self.weight = self.build.pull(weights, f"{name}.weight", self.channels, 1, self.width)[:, 0]
        if self.has_bias:
            self.bias = self.build.pull(weights, f"{name}.bias", self.channels)

    def forward(self, x: Tensor, step: Ragged, state: Tensor) -> Tensor:
        """x [T, channels], state [num_rows, channels, width - 1] -> [T, channels]."""
        y = ops.causal_conv(x, self.weight, self.bias, state, step.rows, step.query_starts, self.silu)
        return cast(Tensor, y)


class ShortConv(nn.Module):
    """b, c and x in one product; convolve b * x; c times that; output."""

    def __init__(self, s: spec.ShortConv, build: Build):
        super().__init__()
        self.into = Linear(build.dim, {"in_proj": 3 * build.dim}, build, bias=s.bias)
        self.conv = Conv(build.dim, s.width, build, bias=s.bias)
        self.out = Linear(build.dim, {"out_proj": build.dim}, build, bias=s.bias)

    def load(self, weights: Weights, name: str) -> None:
        self.into.load(weights, name)
        self.conv.load(weights, f"{name}.conv")
        self.out.load(weights, name)

    def heads(self, x: Normed, step: Ragged, cache: State) -> Tensor:
        """x [T, dim] -> what `out` takes [T, dim]."""
        b, c, inner = self.into.of(x).chunk(3, -1)
        return c * self.conv(b * inner, step, cache[0])
