"""C++ kernels for CPUs, registered beside their references where the library was built."""

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quire.kernels.cpu.native import isa, load
from quire.kernels.reference import act_mul, linear, norm_rope, pack_linear, rms_norm

BOTH = (torch.float32, torch.bfloat16)
ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1}  # as in elementwise.cpp
BLOCK_OUTPUTS, INPUT_STEP, UNIT_BYTES = 64, 32, 4  # as in linear.cpp


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight as linear.cpp wants it; takes the place of a tensor as `linear`'s second argument."""

    data: Tensor  # [outputs / 64, units, 64, per_unit], a unit being 4 bytes
    outputs: int
    inputs: int


def _register_linear(library: ctypes.CDLL, level: int, threads: Callable[[], int]) -> None:
    library.quire_pack_linear.argtypes = (c_int32, c_int32, c_void_p, c_void_p, *[c_int64] * 3)
    library.quire_linear.argtypes = (*[c_int32] * 4, *[c_void_p] * 4, *[c_int64] * 4)
    product = library.quire_linear

    @pack_linear.on("cpu", *BOTH)
    def pack_linear_native(weight: Tensor) -> PackedWeight:
        outputs, inputs = weight.shape
        per_unit = UNIT_BYTES // weight.dtype.itemsize
        blocks, units = -(-outputs // BLOCK_OUTPUTS), -(-inputs // INPUT_STEP) * INPUT_STEP // per_unit
        data = torch.empty(blocks, units, BLOCK_OUTPUTS, per_unit, dtype=weight.dtype)
        weight, bf16 = weight.contiguous(), weight.dtype is torch.bfloat16
        library.quire_pack_linear(threads(), bf16, weight.data_ptr(), data.data_ptr(), outputs, inputs, units)
        return PackedWeight(data, outputs, inputs)

    @linear.on("cpu", *BOTH)
    def linear_native(
        x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, dtype: torch.dtype | None = None
    ) -> Tensor:
        if isinstance(weight, Tensor):
            return linear.reference(x, weight, bias, dtype)
        if weight.inputs % INPUT_STEP:
            x = torch.nn.functional.pad(x, (0, -weight.inputs % INPUT_STEP))
        if x.dim() != 2 or x.stride(1) != 1:
            x = x.contiguous()
        out = torch.empty((*x.shape[:-1], weight.outputs), dtype=dtype or x.dtype)
        stride = x.stride(0) if x.dim() == 2 else x.shape[-1]
        product(
            *(level, threads(), x.dtype is torch.bfloat16, out.dtype is torch.bfloat16),
            *(
                out.data_ptr(),
                x.data_ptr(),
                weight.data.data_ptr(),
                None if bias is None else bias.data_ptr(),
            ),
            *(x.numel() // x.shape[-1], weight.outputs, weight.data.shape[1], stride * x.element_size()),
        )
        return out


def _register(library: ctypes.CDLL, level: int, threads: Callable[[], int]) -> None:
    common: tuple[Any, ...] = (
        c_int32,
        c_int32,
        c_int32,
    )  # instruction set, threads, whether bf16 (else float32)
    library.quire_rms_norm.argtypes = (*common, *[c_void_p] * 3, *[c_int64] * 3, c_float, c_float)
    rows: tuple[Any, ...] = (c_void_p, *[c_int64] * 5)
    library.quire_norm_rope.argtypes = (*common, *rows, c_void_p, c_float, c_void_p, c_void_p, c_void_p)
    library.quire_act_mul.argtypes = (*common, c_void_p, c_void_p, c_int64, c_int64, c_int32)
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
    _register(_library, isa(), torch.get_num_threads)
    _register_linear(_library, isa(), torch.get_num_threads)
