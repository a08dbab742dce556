"""RMS norm and layer norm, and the residual stream that they read."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quire.kernels import ops
from quire.layers.base import Build, Weights
from quire.models import spec
from quire.parallel.axis import Axis


@dataclass(frozen=True, slots=True)
class Normed:
    """A norm's result [T, dim]; its rows may be unscaled, for whoever reads it to scale what comes of them."""

    values: Tensor
    scale: ops.RowScale | None = None

    def tensor(self) -> Tensor:
        return ops.finish_norm(self.values, self.scale)


class Norm(nn.Module):
    """Normalises the last dimension; its weight may have a row per head. Of an `axis`, each rank has a part of it."""

    def __init__(self, s: spec.Norm, shape: tuple[int, ...], build: Build, axis: Axis | None = None):
        super().__init__()
        self.spec, self.shape, self.build, self.axis = s, shape, build, axis or Axis()
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
        if self.axis.size > 1:
            return self._spread(x)
        if s.kind == "layer":
            return ops.layer_norm(x, self.weight, self.bias, s.eps, s.offset)
        y = ops.rms_norm(x, self.weight, s.eps, s.offset)
        return y if self.bias is None else y + self.bias

    def _spread(self, x: Tensor) -> Tensor:
        """x [..., D], of which every rank has as many."""
        s, total, y = self.spec, x.shape[-1] * self.axis.size, x.float()
        if s.kind == "layer":
            y = y - self.axis.all_reduce(y.sum(-1, keepdim=True)) / total
        y = y * torch.rsqrt(self.axis.all_reduce(y.square().sum(-1, keepdim=True)) / total + s.eps)
        if self.weight is not None:
            y = y * (self.weight.float() + s.offset)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    @property
    def rms(self) -> ops.RmsNorm | None:
        """What operations with an RMS norm in them take; None for other norms."""
        s = self.spec
        return ops.RmsNorm(self.weight, s.eps, s.offset) if s.kind == "rms" and not s.bias else None


def rms_of(norm: Norm | None) -> ops.RmsNorm | None:
    return None if norm is None else norm.rms


def add(x: Tensor, residual: Tensor, post: Norm | None, following: Norm | None) -> tuple[Tensor, Normed]:
    """(residual + post(x), its norm), in as few operations as their kinds allow."""
    norm = rms_of(following)
    if norm is not None and (post is None or post.rms is not None):
        total, y = ops.add_norm(x, residual, norm, rms_of(post))
        return total, Normed(y)
    total = ops.add(x if post is None else post(x), residual)
    return total, normed(total.to(x.dtype), following)


def normed(x: Tensor, norm: Norm | None) -> Normed:
    return Normed(x if norm is None else norm(x))


def mean(x: Tensor) -> Tensor:
    """Of the last dimension of x [..., D], in an order that nothing but D decides -> [..., 1] float32."""
    total = x.float()
    while (half := total.shape[-1] // 2) > 0:
        rest = total[..., 2 * half :]
        total = total[..., :half] + total[..., half : 2 * half]
        if rest.shape[-1]:
            total = torch.cat((total, rest), -1)
    return total / x.shape[-1]
