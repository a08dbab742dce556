"""What every operation computes, in plain torch: float32 inside, the input's dtype outside.

Operations that are several in one are written as these, each of which may have a kernel. A kernel of the whole rounds
less often: only what it stores.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.kernels.dispatch import op
from quire.kernels.quantized import Quantized, quantized_linear

SWIGLU_OAI = "swiglu_oai"  # a gate of its own
SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0  # as in activations.inl and triton/elementwise.py


@op
def embed(ids: Tensor, table: Any, scale: float = 1.0, first: int | None = None) -> Tensor:
    """Rows `ids` [T] int64 of a table [N, D], or of what `as_table` made of it, times `scale` -> [T, D].

    `first`: the table is only rows first .. first + N - 1; all others are 0.
    """
    if first is not None:
        here = (ids >= first) & (ids < first + len(table))
        rows = embed(torch.where(here, ids - first, 0), table, scale)
        return torch.where(here[:, None], rows, 0)
    rows = F.embedding(ids, table)
    return rows if scale == 1.0 else rows * scale


@op
def as_table(table: Tensor, weight: Any) -> Any:
    """What `embed` takes of a table [N, D] that is a product's weight, too: less memory where one form serves both.

    `weight` is what the product has.
    """
    return table


@op
def pick(table: Tensor, columns: Tensor) -> Tensor:
    """Columns [R] int64 of a table [N, M] -> [N, R]."""
    return table.index_select(1, columns)


@op
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """x / rms(x) * (weight + offset) over the last dimension. x [..., D], weight [D] or [H, D]."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * (weight.float() + offset)).to(x.dtype)


class RmsNorm(NamedTuple):
    """An RMS norm's part of an operation; see `rms_norm`."""

    weight: Tensor | None
    eps: float
    offset: float = 0.0


class RowScale(NamedTuple):
    """What rows [M, D] have still to be multiplied by: 1 / sqrt(sum(squares) / D + eps)."""

    squares: Tensor  # [M, parts] float32
    eps: float


@op
def finish_norm(values: Tensor, scale: RowScale | None) -> Tensor:
    """values [M, D], each row multiplied by its scale, if any."""
    if scale is None:
        return values
    mean = scale.squares.sum(-1, keepdim=True) / values.shape[-1]
    return (values.float() * torch.rsqrt(mean + scale.eps)).to(values.dtype)


@op
def add(x: Tensor, residual: Tensor) -> Tensor:
    """residual + x, as precise as the residual. Both [T, D]."""
    return residual + x


@op
def add_norm(
    x: Tensor, residual: Tensor, norm: RmsNorm, post: RmsNorm | None = None
) -> tuple[Tensor, Tensor]:
    """(residual + post(x), its norm in x's dtype). x and residual [T, D]; the sum is as precise as the residual."""
    total = add(x if post is None else rms_norm(x, *post), residual)
    return total, rms_norm(total, *norm).to(x.dtype)


@op
def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float = 0.0
) -> Tensor:
    """(x - mean) / std * (weight + offset) + bias over the last dimension. x [..., D]."""
    y = x.float()
    y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.float() + offset)
    return (y if bias is None else y + bias.float()).to(x.dtype)


@op
def norm_rope(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    interleaved: bool,
) -> Tensor:
    """RMS-normalise each head by weight [H, D] float32, where given, then rotate its first 2 * R dimensions.

    x [T, H, D]; cos and sin [max_length, R] float32; positions [T]. A kernel may work in place.
    """
    y = x.float()
    if weight is not None:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight
    cos, sin = cos[positions][:, None], sin[positions][:, None]
    turned, rest = y.split((2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]), -1)
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned, rest), -1).to(x.dtype)


def _activate(x: Tensor, kind: str) -> Tensor:
    match kind:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_pytorch_tanh" | "gelu_new":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case "relu2":
            return F.relu(x).square()
        case "sigmoid":
            return x.sigmoid()
    raise ValueError(f"unknown activation {kind!r}")


@op
def act(x: Tensor, kind: str) -> Tensor:
    """An activation by its Hugging Face name, or sigmoid."""
    return _activate(x.float(), kind).to(x.dtype)


@op
def act_mul(x: Tensor, kind: str) -> Tensor:
    """act(gate) * up, or what else a gate lets through. x [..., 2 * I]: gate, then up -> [..., I]."""
    gate, up = x.float().chunk(2, -1)
    if kind == SWIGLU_OAI:  # OpenAI's: clamped, and up is more or less than 1
        gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
        return (gate * (SWIGLU_ALPHA * gate).sigmoid() * (up + 1)).to(x.dtype)
    return (_activate(gate, kind) * up).to(x.dtype)


def act_mul_within(x: Tensor, kind: str, limit: float) -> Tensor:
    """`act_mul`, where act(gate) is at most `limit` and up within it; as several operations on every device."""
    gate, up = x.chunk(2, -1)
    return act(gate, kind).clamp(max=limit) * up.clamp(-limit, limit)


@op
def linear(x: Tensor, weight: Any, bias: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """x @ weight.T + bias, as `dtype` or x's. The weight may be what `pack_linear` or `quantize_linear` made of it.

    x [..., inputs], weight [outputs, inputs]; or a weight per head, [H, outputs, inputs], and x [T, H, inputs].
    """
    if isinstance(weight, Quantized):
        return quantized_linear(x, weight, bias, dtype)
    if weight.dim() == 3:
        y = torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
    else:
        y = F.linear(x, weight, bias)
    return y if dtype is None else y.to(dtype)


@op
def normed_linear(
    values: Tensor,
    scale: RowScale | None,
    weight: Any,
    bias: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`linear` of a norm's result whose rows may be unscaled. values [T, inputs] -> [T, outputs]."""
    return linear(finish_norm(values, scale), weight, bias, dtype)


@op
def normed_act_mul(
    values: Tensor, scale: RowScale | None, weight: Any, bias: Tensor | None, kind: str
) -> Tensor:
    """`act_mul` of `normed_linear`. values [T, inputs], weight [2 * I, inputs]: gates, then ups -> [T, I]."""
    return act_mul(normed_linear(values, scale, weight, bias), kind)


@op
def linear_add_norm(
    x: Tensor, weight: Any, bias: Tensor | None, residual: Tensor, norm: RmsNorm
) -> tuple[Tensor, Tensor, RowScale | None]:
    """(residual + linear(x), its norm, what the norm's rows have still to be multiplied by).

    x [T, inputs], residual [T, outputs] -> [T, outputs] twice: at least as precise as the residual, and in x's dtype.
    """
    return *add_norm(linear(x, weight, bias), residual, norm), None


@op
def pack_linear(weight: Tensor, invariant: bool = False) -> Any:
    """A weight [outputs, inputs] or [H, outputs, inputs], left as it is, in the form that `linear` is fastest with.

    `invariant`: of forms whose results for a row are the same bits for any number of rows, which plain torch has not.
    """
    return weight
