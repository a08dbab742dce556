"""Feed-forward layers."""

from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quire.kernels import ops
from quire.layers.base import Build, Weights
from quire.layers.linear import Linear
from quire.layers.norm import Norm, Normed, add, mean
from quire.models import spec
from quire.parallel.axis import Axis


class XIELU(nn.Module):
    """A parabola above zero and an exponential below, each with a slope that was learned (Huang and Schlag 2024)."""

    def __init__(self, build: Build):
        super().__init__()
        self.build = build
        self.above = self.below = self.beta = self.eps = torch.empty(0)

    def load(self, weights: Weights, name: str) -> None:
        pull, dtype = self.build.pull, torch.float32
        self.beta = pull(weights, f"{name}.beta", dtype=dtype)
        self.eps = pull(weights, f"{name}.eps", dtype=dtype)
        self.above = F.softplus(pull(weights, f"{name}.alpha_p", 1, dtype=dtype))
        self.below = F.softplus(pull(weights, f"{name}.alpha_n", 1, dtype=dtype)) + self.beta

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        below = (torch.minimum(y, self.eps).expm1() - y) * self.below
        return (torch.where(y > 0, self.above * y.square(), below) + self.beta * y).to(x.dtype)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), gate and up in one product; or down(act(up(x)))."""

    def __init__(self, s: spec.MLP, build: Build, axis: Axis | None = None, *, partial: bool = False):
        """`axis`: whose ranks have hidden numbers each; the caller adds up what is left `partial`."""
        super().__init__()
        self.spec = s
        gate = {"gate_proj": s.hidden} if s.gated else {}
        self.up = Linear(build.dim, gate | {"up_proj": s.hidden}, build, bias=s.bias)
        down = {"down_proj": build.dim}
        self.down = Linear(s.hidden, down, build, bias=s.bias, axis=axis, partial=partial)
        self.curve = XIELU(build) if s.act == "xielu" else None
        deviations = NormalDist().inv_cdf(s.sparsity) if s.sparsity else 0.0  # rounded as Hugging Face's
        self.cutoff = torch.tensor(deviations, dtype=build.dtype).item()

    def load(self, weights: Weights, name: str) -> None:
        self.up.load(weights, name)
        self.down.load(weights, name)
        if self.curve is not None:
            self.curve.load(weights, f"{name}.act_fn")

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

    def hidden(self, y: Normed, more: Tensor | None = None) -> Tensor:
        """y [T, dim] -> [T, hidden], what `down` takes; `more` is added to gate and up, side by side."""
        if more is not None:
            return ops.act_mul(self.up.of(y) + more, self.spec.act)
        if self.spec.limit is not None:
            return ops.act_mul_within(self.up.of(y), self.spec.act, self.spec.limit)
        if self.spec.gate_scale != 1.0 or self.spec.sparsity:
            gate, up = self.up.of(y).chunk(2, -1)
            gate = self._sparse(gate) if self.spec.sparsity else gate * self.spec.gate_scale
            return ops.act_mul(torch.cat((gate, up), -1), self.spec.act)
        if self.spec.gated:
            return ops.normed_act_mul(y.values, y.scale, self.up.weight, self.up.bias, self.spec.act)
        up = self.up.of(y)
        return ops.act(up, self.spec.act) if self.curve is None else self.curve(up)

    def _sparse(self, gate: Tensor) -> Tensor:
        """What of a token's gates [T, hidden] is above a quantile, were they normally distributed; else 0."""
        x = gate.float()
        middle = mean(x)
        deviation = mean((x - middle).square()).sqrt()
        return (x - (middle + deviation * self.cutoff)).relu().to(gate.dtype)
