"""Attention and state spaces side by side (Falcon-H1)."""

import torch
from torch import Tensor, nn

from quire.attention.base import LayerCache, Ragged
from quire.attention.states import State
from quire.layers.attention import Attention
from quire.layers.base import Build, Weights
from quire.layers.linear import Linear
from quire.layers.mamba import Mamba2
from quire.layers.norm import Norm, Normed, add
from quire.models import spec


class Sum(nn.Module):
    """The products of two mixers' results, which lie side by side, each times its scale, added."""

    def __init__(self, parts: tuple[Linear, Linear], scales: tuple[float, float]):
        super().__init__()
        self.parts, self.scales = parts, scales

    def forward(self, x: Tensor) -> Tensor:
        """x [T, inputs of both] -> [T, dim]."""
        inputs = x.split([part.inputs for part in self.parts], -1)
        a, b = (part(y) * scale for part, y, scale in zip(self.parts, inputs, self.scales, strict=True))
        return a + b

    def added(
        self, x: Tensor, residual: Tensor, post: Norm | None, following: Norm | None
    ) -> tuple[Tensor, Normed]:
        """(residual + post(this of x), its norm)."""
        return add(self(x), residual, post, following)


class Both(nn.Module):
    """What attention and state spaces find in the same input."""

    def __init__(self, s: spec.Both, build: Build):
        super().__init__()
        self.attention, self.states = Attention(s.attention, build), Mamba2(s.states, build)
        self.out = Sum((self.attention.out, self.states.out), (s.attention_scale, s.states_scale))

    def load(self, weights: Weights, name: str) -> None:
        self.attention.load(weights, f"{name}.attention")
        self.states.load(weights, f"{name}.states")

    def heads(self, x: Normed, step: Ragged, cache: tuple[LayerCache, State]) -> Tensor:
        """x [T, dim] -> what `out` takes, the heads' results before the states'."""
        keys, state = cache
        return torch.cat((self.attention.heads(x, step, keys), self.states.heads(x, step, state)), -1)
