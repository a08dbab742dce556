"""Feed-forward layers."""

import torch
from torch import Tensor, nn

from quire.kernels import ops
from quire.layers.base import Build, Weights
from quire.layers.linear import Linear
from quire.layers.norm import Norm, Normed, add
from quire.models import spec


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), gate and up in one product; or down(act(up(x)))."""

    def __init__(self, s: spec.MLP, build: Build):
        super().__init__()
        self.spec = s
        gate = {"gate_proj": s.hidden} if s.gated else {}
        self.up = Linear(build.dim, gate | {"up_proj": s.hidden}, build, bias=s.bias)
        self.down = Linear(s.hidden, {"down_proj": build.dim}, build, bias=s.bias)

    def load(self, weights: Weights, name: str) -> None:
        self.up.load(weights, name)
        self.down.load(weights, name)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, dim] -> [T, dim]."""
        y = self.down(self.hidden(Normed(x)))
        return y if self.spec.out_scale == 1.0 else y * self.spec.out_scale

    def added(
        self, y: Normed, residual: Tensor, post: Norm | None, following: Norm | None
    ) -> tuple[Tensor, Normed]:
        """(residual + post(this of y), its norm)."""
        if self.spec.out_scale != 1.0:
            return add(self.down(self.hidden(y)) * self.spec.out_scale, residual, post, following)
        return self.down.added(self.hidden(y), residual, post, following)

    def hidden(self, y: Normed) -> Tensor:
        """y [T, dim] -> [T, hidden], what `down` takes."""
        if self.spec.gate_scale != 1.0:
            gate, up = self.up.of(y).chunk(2, -1)
            return ops.act_mul(torch.cat((gate * self.spec.gate_scale, up), -1), self.spec.act)
        if self.spec.gated:
            return ops.normed_act_mul(y.values, y.scale, self.up.weight, self.up.bias, self.spec.act)
        return ops.act(self.up.of(y), self.spec.act)
