"""Triton kernels, registered beside their references. Importing this imports Triton; ops.py does where it can run."""

import torch
from torch import Tensor

from quire.kernels import reference
from quire.kernels.reference import RmsNorm, add_norm, layer_norm, norm_rope, rms_norm
from quire.kernels.triton import elementwise

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "sigmoid": "sigmoid",
    "swiglu_oai": "swiglu_oai",
}
COUNT = 1024  # numbers of an activation that a program computes
HEAD_NUMBERS = 2048  # of a token that a program rotates
NO_NORM = RmsNorm(None, 0.0)
MOST_COLUMNS = 32768  # that a program normalises; wider rows would not fit in its registers


def power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def _normalised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, centred: bool
) -> Tensor:
    size, out = x.shape[-1], torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.dim() not in (2, 3) or x.stride(-1) != 1:
        x = x.contiguous()
    per_row = weight is not None and weight.dim() == 2
    inner = x.shape[-2] if x.dim() > 2 or per_row else 1
    if x.dim() == 2:
        strides = (inner * x.stride(0), x.stride(0))
    else:
        strides = (x.stride(-3), x.stride(-2)) if x.dim() > 2 else (size, size)
    width = power_of_two(size)
    if out.numel():
        elementwise.norm[(out.numel() // size,)](
            *(x, out, weight if weight is None else weight.contiguous(), bias, eps, offset, inner),
            *(*strides, size if per_row else 0),
            SIZE=size,
            WIDTH=width,
            CENTRED=centred,
            num_warps=min(max(width // 512, 1), 16),
        )
    return out


@rms_norm.on("cuda", *DTYPES)
def rms_norm_triton(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    if x.shape[-1] > MOST_COLUMNS:
        return rms_norm.reference(x, weight, eps, offset)
    return _normalised(x, weight, None, eps, offset, False)


@layer_norm.on("cuda", *DTYPES)
def layer_norm_triton(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float = 0.0
) -> Tensor:
    if x.shape[-1] > MOST_COLUMNS or (bias is not None and bias.dim() > 1):
        return layer_norm.reference(x, weight, bias, eps, offset)
    return _normalised(x, weight, bias, eps, offset, True)


@add_norm.on("cuda", *DTYPES)
def add_norm_triton(
    x: Tensor, residual: Tensor, norm: RmsNorm, post: RmsNorm | None = None
) -> tuple[Tensor, Tensor]:
    size = x.shape[-1]
    if size > MOST_COLUMNS or x.dim() != 2 or x.stride(1) != 1 or residual.stride(1) != 1:
        return add_norm.reference(x, residual, norm, post)
    total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    out, after, width = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        post or NO_NORM,
        power_of_two(size),
    )
    if out.numel():
        elementwise.add_norm[(len(x),)](
            *(x, residual, total, out, norm.weight, after.weight, norm.eps, norm.offset),
            *(after.eps, after.offset, x.stride(0), residual.stride(0)),
            SIZE=size,
            WIDTH=width,
            POST=post is not None,
            num_warps=min(max(width // 512, 1), 16),
        )
    return total, out


@norm_rope.on("cuda", *DTYPES)
def norm_rope_triton(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    interleaved: bool,
) -> Tensor:
    tokens, heads, size = x.shape
    if x.stride(2) != 1:
        x = x.contiguous()
    half = cos.shape[-1]
    at_once = min(power_of_two(heads), max(1, HEAD_NUMBERS // power_of_two(size)))
    rest = size - 2 * half
    if tokens:
        elementwise.norm_rope[tokens, -(-heads // at_once)](
            *(x, weight, cos, sin, positions, eps, x.stride(0), x.stride(1)),
            HEADS=heads,
            AT_ONCE=at_once,
            DIM=size,
            HALF=half,
            WIDTH=power_of_two(half),
            REST=power_of_two(rest) if rest else 0,
            INTERLEAVED=interleaved,
        )
    return x


@reference.act.on("cuda", *DTYPES)
def act_triton(x: Tensor, kind: str) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    if out.numel():
        elementwise.act[(-(-out.numel() // COUNT),)](x, out, out.numel(), KIND=ACTIVATIONS[kind], COUNT=COUNT)
    return out


@reference.act_mul.on("cuda", *DTYPES)
def act_mul_triton(x: Tensor, kind: str) -> Tensor:
    x = x.contiguous()
    size = x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device)
    if out.numel():
        elementwise.act_mul[out.numel() // size, -(-size // COUNT)](
            x, out, SIZE=size, KIND=ACTIVATIONS[kind], COUNT=COUNT
        )
    return out
