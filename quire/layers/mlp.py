"""Feed-forward layers."""

from torch import Tensor, nn

from quire.kernels import ops
from quire.layers.base import Build, Weights
from quire.layers.linear import Linear
from quire.layers.norm import Norm, Normed
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
        return self.down(self.hidden(Normed(x)))

    def added(
        self, y: Normed, residual: Tensor, post: Norm | None, following: Norm | None
    ) -> tuple[Tensor, Normed]:
        """(residual + post(this of y), its norm)."""
        return self.down.added(self.hidden(y), residual, post, following)

    def hidden(self, y: Normed) -> Tensor:
        """y [T, dim] -> [T, hidden], what `down` takes."""
        if self.spec.gated:
            return ops.normed_act_mul(y.values, y.scale, self.up.weight, self.up.bias, self.spec.act)
        return ops.act(self.up.of(y), self.spec.act)
