"""Triton kernels, registered beside their references. Importing this imports Triton; ops.py does where it can run."""

import torch
from torch import Tensor

from quire.kernels import reference
from quire.kernels.recurrent import causal_conv, recurrence
from quire.kernels.reference import RmsNorm, add_norm, layer_norm, norm_rope, rms_norm
from quire.kernels.triton import elementwise
from quire.kernels.triton import recurrence as recurrent

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
MATRIX_NUMBERS = 4096  # of a head's state that a program holds
CHANNELS = 128  # of a convolution, to a program
POSITIONS = 32  # of a convolution at a time, where sequences have many
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


@recurrence.on("cuda", *DTYPES)
def recurrence_triton(
    v: Tensor,
    q: Tensor,
    k: Tensor,
    decay: Tensor,
    beta: Tensor | None,
    state: Tensor,
    rows: Tensor,
    query_starts: Tensor,
) -> Tensor:
    (_, heads, dv), (_, key_heads, dk) = v.shape, k.shape
    v, q, k = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (v, q, k))
    out = torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    keys = power_of_two(dk)
    piece = min(power_of_two(dv), max(MATRIX_NUMBERS // keys, 16))
    if len(rows):
        recurrent.recur[len(rows), heads, -(-dv // piece)](
            *(v, q, k, decay.contiguous(), beta if beta is None else beta.contiguous(), state, rows),
            *(query_starts, out, v.stride(0), q.stride(0), k.stride(0), state.stride(0)),
            HEADS=heads,
            GROUP=heads // key_heads,
            DK=dk,
            DV=dv,
            KEYS=keys,
            PIECE=piece,
            PER_CHANNEL=decay.shape[2] > 1,
        )
    return out


@causal_conv.on("cuda", *DTYPES)
def causal_conv_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    rows: Tensor,
    query_starts: Tensor,
    silu: bool,
) -> Tensor:
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    channels, width = weight.shape
    if len(rows):
        recurrent.convolve[len(rows), -(-channels // CHANNELS)](
            *(x, weight.contiguous(), bias, state, rows, query_starts, out, x.stride(0), state.stride(0)),
            CHANNELS=channels,
            PIECE=CHANNELS,
            WIDTH=width,
            ROUND=power_of_two(width - 1),
            AT_ONCE=POSITIONS if len(x) > 2 * len(rows) else 1,
            SILU=silu,
        )
    return out
