"""CPU kernels, registered beside their references: C++ where the library was built, oneDNN through torch."""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from quire.kernels.cpu.native import isa, load
from quire.kernels.reference import act_mul, linear, norm_rope, pack_linear, rms_norm

BATCH_HINT = 32  # oneDNN picks the weight's blocking for this many rows; it is as fast at 1 and at 512
BOTH = (torch.float32, torch.bfloat16)
ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1}  # as in elementwise.cpp

_reorder = torch.ops.mkldnn._reorder_linear_weight
_product = torch.ops.mkldnn._linear_pointwise.default


@pack_linear.on("cpu", torch.bfloat16)
def pack_linear_bf16(weight: Tensor) -> Tensor:
    """oneDNN's blocked form: 1.5 times F.linear's speed at 1 to 8 rows, 1.3 at 32, the same at 512."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return weight
    return _reorder(weight, BATCH_HINT)


@linear.on("cpu", torch.bfloat16)
def linear_bf16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not weight.is_mkldnn:
        return torch.nn.functional.linear(x, weight, bias)
    return _product(x, weight, bias, "none", [], "")


def _register(library: ctypes.CDLL) -> None:
    common: tuple[Any, ...] = (c_int32, c_int32, c_int32)  # instruction set, threads, whether bf16 (else float32)
    library.quire_rms_norm.argtypes = (*common, *[c_void_p] * 3, *[c_int64] * 3, c_float, c_float)
    rows: tuple[Any, ...] = (c_void_p, *[c_int64] * 5)
    library.quire_norm_rope.argtypes = (*common, *rows, c_void_p, c_float, c_void_p, c_void_p, c_void_p)
    library.quire_act_mul.argtypes = (*common, c_void_p, c_void_p, c_int64, c_int64, c_int32)
    level, threads = isa(), torch.get_num_threads
    rms, rope, activate = library.quire_rms_norm, library.quire_norm_rope, library.quire_act_mul

    @rms_norm.on("cpu", *BOTH)
    def rms_norm_native(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
        size = x.shape[-1]
        if weight is not None and weight.dim() != 1:
            return rms_norm.reference(x, weight, eps, offset)
        if x.dim() != 2 or x.stride(1) != 1:
            x = x.contiguous()
        out = torch.empty(x.shape, dtype=x.dtype)
        rows = x.numel() // size
        rms(
            *(level, threads(), x.dtype is torch.bfloat16, out.data_ptr(), x.data_ptr()),
            *(None if weight is None else weight.data_ptr(), rows, size),
            *(x.stride(0) if x.dim() == 2 else size, eps, offset),
        )
        return out

    @norm_rope.on("cpu", *BOTH)
    def norm_rope_native(
        x: Tensor,
        weight: Tensor | None,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        interleaved: bool,
    ) -> Tensor:
        rows, heads, size = x.shape
        if interleaved:
            return norm_rope.reference(x, weight, eps, cos, sin, positions, interleaved)
        if x.stride(1) != size or x.stride(2) != 1:
            x = x.contiguous()
        rope(
            *(level, threads(), x.dtype is torch.bfloat16, x.data_ptr(), rows, heads, size, x.stride(0)),
            *(cos.shape[1], None if weight is None else weight.data_ptr(), eps),
            *(cos.data_ptr(), sin.data_ptr(), positions.data_ptr()),
        )
        return x

    @act_mul.on("cpu", *BOTH)
    def act_mul_native(x: Tensor, kind: str) -> Tensor:
        if kind not in ACTIVATIONS:
            return act_mul.reference(x, kind)
        x = x.contiguous()
        size = x.shape[-1] // 2
        out = torch.empty((*x.shape[:-1], size), dtype=x.dtype)
        rows = x.numel() // (2 * size)
        activate(
            *(level, threads(), x.dtype is torch.bfloat16, out.data_ptr(), x.data_ptr()),
            *(rows, size, ACTIVATIONS[kind]),
        )
        return out


if (_library := load()[0]) is not None:
    _register(_library)
