"""RMS norm and layer norm."""

from torch import Tensor, nn

from quire.kernels import ops
from quire.layers.base import Build, Weights
from quire.models import spec


class Norm(nn.Module):
    """Normalises the last dimension; its weight may have a row per head."""

    def __init__(self, s: spec.Norm, shape: tuple[int, ...], build: Build):
        super().__init__()
        self.spec, self.shape, self.build = s, shape, build
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def load(self, weights: Weights, name: str) -> None:
        if self.spec.weight:
            self.weight = self.build.pull(weights, f"{name}.weight", *self.shape)
        if self.spec.bias:
            self.bias = self.build.pull(weights, f"{name}.bias", *self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D], or [..., H, D] with a weight per head."""
        s = self.spec
        if s.kind == "layer":
            return ops.layer_norm(x, self.weight, self.bias, s.eps, s.offset)
        y = ops.rms_norm(x, self.weight, s.eps, s.offset)
        return y if self.bias is None else y + self.bias
