"""Weights of 8 and 4 bits, made while they load, and what a product with them computes, in plain torch.

Symmetric: 8 bits are an integer from -127 to 127 and a scale per output, 4 bits one from -8 to 7 and a scale, rounded
to bf16, per 64 inputs of an output. A row of inputs becomes int8 with a scale of its own as it comes.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.kernels.dispatch import op

GROUP = 64  # inputs with a scale of their own, of 4 bits
LEAST, MOST = -8, 7
PLACES = (
    -8.0,
    -8.6,
    -9.3,
    -7.4,
    7.0,
    7.5,
    8.2,
)  # where a group's greatest number may come to lie; as in quantized.inl
MOST_INPUTS = 65536  # whose products are sure to fit in an int32


@dataclass(frozen=True, slots=True)
class Quantized:
    """Integers [outputs, inputs] int8 with scales [outputs, groups] float32; takes the place of a weight."""

    integers: Tensor
    scales: Tensor


def check(weight: Tensor, bits: int) -> None:
    """Raises ValueError where sums might not fit, or nothing is known of so many bits."""
    if weight.dim() != 2 or weight.shape[1] > MOST_INPUTS or bits not in (4, 8):
        raise ValueError(
            f"a weight {tuple(weight.shape)} in {bits} bits; it must have two dimensions, at most {MOST_INPUTS} inputs,"
            " and get 4 or 8 bits"
        )


@op
def quantize_linear(weight: Tensor, bits: int) -> Any:
    """A weight [outputs, inputs] as `linear` takes it, with 8 or 4 bits a number."""
    check(weight, bits)
    x = weight.float()
    if bits == 8:
        top = x.abs().amax(1, keepdim=True)
        return Quantized(_integers(x, _divided(127, top), -127, 127), top / 127)
    x = F.pad(x, (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    low, high = x.aminmax(dim=2)
    extreme = torch.where(high > -low, high, low)
    best, scales = torch.full_like(extreme, torch.inf), torch.zeros_like(extreme)
    for place in PLACES:
        scale = (extreme / place).bfloat16().float()
        error = (
            (_integers(x, _divided(1, scale[..., None]), LEAST, MOST) * scale[..., None] - x).square().sum(2)
        )
        scales, best = torch.where(error < best, scale, scales), torch.minimum(error, best)
    integers = _integers(x, _divided(1, scales[..., None]), LEAST, MOST)
    return Quantized(integers.flatten(1)[:, : weight.shape[1]].contiguous(), scales)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 of x [T, inputs], scales [T, 1])."""
    top = x.float().abs().amax(1, keepdim=True)
    return _integers(x.float(), _divided(127, top), -127, 127), top / 127


def quantized_linear(x: Tensor, weight: Quantized, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """`linear` with such a weight. Whole numbers are added up exactly, as float64."""
    rows, row_scales = quantize_rows(x.reshape(-1, x.shape[-1]))
    groups, inputs = weight.scales.shape[1], x.shape[-1]
    size = inputs if groups == 1 else GROUP
    y = torch.zeros(len(rows), len(weight.integers), dtype=torch.float32, device=x.device)
    for group in range(groups):
        part = slice(group * size, min((group + 1) * size, inputs))
        whole = rows[:, part].double() @ weight.integers[:, part].double().T
        y += whole.float() * weight.scales[:, group]
    y *= row_scales
    if bias is not None:
        y += bias.float()
    return y.to(dtype or x.dtype).view(*x.shape[:-1], -1)


def _divided(number: float, by: Tensor) -> Tensor:
    """Rounded once: `number / by` would be number * (1 / by)."""
    return torch.full_like(by, number) / by


def _integers(x: Tensor, inverse: Tensor, low: int, high: int) -> Tensor:
    return (x * inverse.nan_to_num(posinf=0.0)).round().clamp(low, high).to(torch.int8)
