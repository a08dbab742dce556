"""Matrix products with weights, several side by side in one where they share an input."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quire.kernels import ops
from quire.layers.base import Build, Weights
from quire.layers.norm import Norm, Normed, add, rms_of
from quire.parallel.axis import Axis

EXACT = 16  # bits: a weight that is left as it is


class Linear(nn.Module):
    """One weight [sum of parts, inputs]; each part is pulled by its own name: q_proj, k_proj, v_proj.

    After loading, the weight is in whatever form the device's fastest kernel wants (`ops.pack_linear`). Where weights
    are quantized, this one has no fewer than `least_bits`.
    """

    def __init__(
        self,
        inputs: int,
        parts: Mapping[str, int],
        build: Build,
        *,
        bias: bool = False,
        least_bits: int = 4,
        axis: Axis | None = None,
        partial: bool = False,
    ):
        """`axis`: whose ranks have inputs each; results are added up, unless they are to be left `partial`."""
        super().__init__()
        self.axis = axis or Axis()
        self.adds_up = self.axis.size > 1 and not partial
        self.bits = None if build.bits is None or least_bits == EXACT else max(build.bits, least_bits)
        self.inputs, self.parts, self.build, self.has_bias = inputs, dict(parts), build, bias
        self.weight: Any = None  # a tensor, or what `ops.pack_linear` made of it
        self.bias: Tensor | None = None

    def load(self, weights: Weights, name: str, shared: Tensor | None = None) -> None:
        """Pull `{name}.{part}.weight` and bias for every part; `shared` is a weight that is there already."""
        self.bias = self.pull_bias(weights, name)
        self.weight = self.pack(self.pull_weight(weights, name) if shared is None else shared)

    def pack(self, weight: Tensor) -> Any:
        """In the form of the product that is asked for."""
        return self.build.pack(weight) if self.bits is None else ops.quantize_linear(weight, self.bits)

    def pull_bias(self, weights: Weights, name: str) -> Tensor | None:
        """`{name}.{part}.bias` of every part, [sum of parts], if there are biases."""
        if not self.has_bias:
            return None
        parts = self.parts.items()
        bias = torch.cat([self.build.pull(weights, _join(name, p, "bias"), n) for p, n in parts])
        return bias if self.axis.rank == 0 else bias.zero_()  # it is added once

    def pull_weight(self, weights: Weights, name: str) -> Tensor:
        """`{name}.{part}.weight` of every part, [sum of parts, inputs]."""
        build = self.build
        weight = torch.empty(sum(self.parts.values()), self.inputs, dtype=build.dtype, device=build.device)
        start = 0
        for part, outputs in self.parts.items():
            build.fill(weight[start : start + outputs], weights, _join(name, part, "weight"))
            start += outputs
        return weight

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """x [T, inputs] -> [T, sum of parts], as `dtype` or x's."""
        y = ops.linear(x, self.weight, self.bias, dtype)
        return self.axis.all_reduce(y) if self.adds_up else y

    def of(self, y: Normed, dtype: torch.dtype | None = None) -> Tensor:
        """The same of a norm's result."""
        return ops.normed_linear(y.values, y.scale, self.weight, self.bias, dtype)

    def added(
        self, x: Tensor, residual: Tensor, post: Norm | None, following: Norm | None
    ) -> tuple[Tensor, Normed]:
        """(residual + post(this of x), its norm): one operation where that is all RMS norm and no post."""
        norm = rms_of(following)
        if norm is None or post is not None or self.adds_up:
            return add(self(x), residual, post, following)
        total, values, scale = ops.linear_add_norm(x, self.weight, self.bias, residual, norm)
        return total, Normed(values, scale)


def _join(*names: str) -> str:
    return ".".join(filter(None, names))
