"""C++ kernels for CPUs, registered beside their references where the library was built."""

import ctypes
from collections.abc import Callable
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.kernels.cpu.calls import kernel
from quire.kernels.cpu.native import isa, load
from quire.kernels.quantized import GROUP, Quantized, check, quantize_linear
from quire.kernels.reference import (
    RmsNorm,
    act,
    act_mul,
    add,
    add_norm,
    as_table,
    embed,
    linear,
    norm_rope,
    pack_linear,
    pick,
    rms_norm,
)

BOTH = (torch.float32, torch.bfloat16)
ACTIVATIONS = {  # as in elementwise.cpp
    "silu": 0,
    "gelu_pytorch_tanh": 1,
    "gelu_new": 1,
    "gelu": 2,
    "relu": 3,
    "relu2": 4,
    "sigmoid": 5,
}
BLOCK_OUTPUTS, INPUT_STEP, UNIT_BYTES = 64, 32, 4  # as in linear.cpp


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight as linear.cpp wants it; takes the place of a tensor as `linear`'s second argument."""

    data: Tensor  # [groups, outputs / 64, units, 64, per_unit], a unit being 4 bytes
    groups: int
    outputs: int
    inputs: int


@dataclass(frozen=True, slots=True)
class PackedQuantized:
    """A weight of `bits` bits as quantized.cpp makes it."""

    data: Tensor  # uint8 [outputs / 64, padded * 64 * bits / 8]
    scales: Tensor  # [outputs / 64, 64] float32, or [outputs / 64, padded / 64, 64] bfloat16
    outputs: int
    inputs: int
    padded: int
    bits: int


def _register_linear(library: ctypes.CDLL, level: int, threads: Callable[[], int]) -> None:
    library.quire_pack_linear.argtypes = (c_int32, c_int32, c_void_p, c_void_p, *[c_int64] * 4)
    product, quantized = kernel("quire_linear"), _quantized_product(library, level, threads)

    @pack_linear.on("cpu", *BOTH)
    def pack_linear_native(weight: Tensor, invariant: bool = False) -> PackedWeight:
        """The only form is an invariant one."""
        *heads, outputs, inputs = weight.shape
        groups, per_unit = heads[0] if heads else 1, UNIT_BYTES // weight.dtype.itemsize
        blocks, units = -(-outputs // BLOCK_OUTPUTS), -(-inputs // INPUT_STEP) * INPUT_STEP // per_unit
        data = torch.empty(groups, blocks, units, BLOCK_OUTPUTS, per_unit, dtype=weight.dtype)
        weight, bf16 = weight.contiguous(), weight.dtype is torch.bfloat16
        pointers = (weight.data_ptr(), data.data_ptr())
        library.quire_pack_linear(threads(), bf16, *pointers, outputs, inputs, units, groups)
        return PackedWeight(data, groups, outputs, inputs)

    @linear.on("cpu", *BOTH)
    def linear_native(
        x: Tensor,
        weight: Tensor | PackedWeight | PackedQuantized | Quantized,
        bias: Tensor | None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        if isinstance(weight, PackedQuantized):
            return quantized(x, weight, bias, dtype)
        if isinstance(weight, Tensor | Quantized):
            return linear.reference(x, weight, bias, dtype)
        grouped = weight.groups > 1
        if x.dim() != 2 + grouped or x.stride(-1) != 1:
            x = x.contiguous()
        out = torch.empty((*x.shape[:-1], weight.outputs), dtype=dtype or x.dtype)
        size, inputs, bf16 = x.element_size(), x.shape[-1], x.dtype is torch.bfloat16
        rows = x.shape[0] if grouped else x.numel() // inputs
        stride = x.stride(0) if x.dim() == 2 + grouped else inputs
        product(
            *(level, threads(), bf16, out.dtype is torch.bfloat16, bf16),
            *(out.data_ptr(), x.data_ptr(), weight.data.data_ptr(), pointer(bias), 0, 0, 0),
            *(rows, weight.outputs, weight.data.shape[2], stride * size),
            *(weight.groups, x.stride(1) * size if grouped else 0, inputs * size),
        )
        return out


def _quantized_product(
    library: ctypes.CDLL, level: int, threads: Callable[[], int]
) -> Callable[[Tensor, PackedQuantized, Tensor | None, torch.dtype | None], Tensor]:
    """Registers what makes quantized weights; returns the product with one."""
    library.quire_quantize_weight.argtypes = (*[c_int32] * 4, *[c_void_p] * 3, *[c_int64] * 3)
    product = kernel("quire_linear_quantized")

    @quantize_linear.on("cpu", *BOTH)
    def quantize_linear_native(weight: Tensor, bits: int) -> PackedQuantized:
        check(weight, bits)
        (outputs, inputs), weight = weight.shape, weight.contiguous()
        blocks, padded = -(-outputs // BLOCK_OUTPUTS), -(-inputs // GROUP) * GROUP
        data = torch.empty(blocks, padded * BLOCK_OUTPUTS * bits // 8, dtype=torch.uint8)
        if bits == 8:
            scales = torch.empty(blocks, BLOCK_OUTPUTS)
        else:
            scales = torch.empty(blocks, padded // GROUP, BLOCK_OUTPUTS, dtype=torch.bfloat16)
        library.quire_quantize_weight(
            *(level, threads(), weight.dtype is torch.bfloat16, bits),
            *(data.data_ptr(), scales.data_ptr(), weight.data_ptr(), outputs, inputs, padded),
        )
        return PackedQuantized(data, scales, outputs, inputs, padded, bits)

    def multiply(
        x: Tensor, weight: PackedQuantized, bias: Tensor | None, dtype: torch.dtype | None
    ) -> Tensor:
        if x.dim() != 2 or x.stride(1) != 1:
            x = x.contiguous()
        out = torch.empty((*x.shape[:-1], weight.outputs), dtype=dtype or x.dtype)
        stride = x.stride(0) if x.dim() == 2 else x.shape[-1]
        product(
            *(level, threads(), weight.bits, x.dtype is torch.bfloat16, out.dtype is torch.bfloat16),
            *(out.data_ptr(), x.data_ptr(), weight.data.data_ptr(), weight.scales.data_ptr(), pointer(bias)),
            *(
                x.numel() // weight.inputs,
                weight.inputs,
                weight.outputs,
                weight.padded,
                stride * x.element_size(),
            ),
        )
        return out

    return multiply


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def rows_of(x: Tensor) -> tuple[Tensor, int, int]:
    """(x with the numbers of a row side by side, its rows, numbers from a row to the next)."""
    if x.dim() != 2 or x.stride(1) != 1:
        x = x.contiguous()
    size = x.shape[-1]
    return x, x.numel() // size, x.stride(0) if x.dim() == 2 else size


def _register_norms(library: ctypes.CDLL, level: int, threads: Callable[[], int]) -> None:
    rms, add_normed = kernel("quire_rms_norm"), kernel("quire_add_norm")

    @rms_norm.on("cpu", *BOTH)
    def rms_norm_native(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
        size = x.shape[-1]
        if weight is not None and weight.dim() != 1:
            return rms_norm.reference(x, weight, eps, offset)
        x, rows, stride = rows_of(x)
        out = torch.empty(x.shape, dtype=x.dtype)
        rms(
            *(level, threads(), x.dtype is torch.bfloat16, out.data_ptr(), x.data_ptr(), pointer(weight)),
            *(rows, size, stride, eps, offset),
        )
        return out

    @add_norm.on("cpu", *BOTH)
    def add_norm_native(
        x: Tensor, residual: Tensor, norm: RmsNorm, post: RmsNorm | None = None
    ) -> tuple[Tensor, Tensor]:
        weight, eps, offset = norm
        if x.dtype is not residual.dtype or weight is not None and weight.dim() != 1:
            return add_norm.reference(x, residual, norm, post)
        x, rows, stride = rows_of(x if post is None else rms_norm(x, *post))
        residual, _, residual_stride = rows_of(residual)
        total, out = (torch.empty(x.shape, dtype=x.dtype) for _ in range(2))
        add_normed(
            *(level, threads(), x.dtype is torch.bfloat16, total.data_ptr(), out.data_ptr()),
            *(x.data_ptr(), residual.data_ptr(), pointer(weight)),
            *(rows, x.shape[-1], stride, residual_stride, eps, offset),
        )
        return total, out

    @add.on("cpu", *BOTH)
    def add_native(x: Tensor, residual: Tensor) -> Tensor:
        if x.dtype is not residual.dtype or x.shape != residual.shape:
            return add.reference(x, residual)
        (x, rows, stride), (residual, _, residual_stride) = rows_of(x), rows_of(residual)
        total = torch.empty(x.shape, dtype=x.dtype)
        add_normed(
            *(level, threads(), x.dtype is torch.bfloat16, total.data_ptr(), 0),
            *(x.data_ptr(), residual.data_ptr(), 0),
            *(rows, x.shape[-1], stride, residual_stride, 0.0, 0.0),
        )
        return total


def _register_rotation(library: ctypes.CDLL, level: int, threads: Callable[[], int]) -> None:
    rope = kernel("quire_norm_rope")

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
        if x.stride(1) != size or x.stride(2) != 1:
            x = x.contiguous()
        rope(
            *(level, threads(), x.dtype is torch.bfloat16, x.data_ptr(), rows, heads, size, x.stride(0)),
            *(cos.shape[1], pointer(weight), cos.data_ptr(), sin.data_ptr(), positions.data_ptr()),
            *(eps, interleaved),
        )
        return x


def _register_activations(library: ctypes.CDLL, level: int, threads: Callable[[], int]) -> None:
    activate = kernel("quire_act")

    def activated(x: Tensor, kind: str, gated: bool) -> Tensor:
        x = x.contiguous()
        size = x.shape[-1] >> gated
        out = torch.empty((*x.shape[:-1], size), dtype=x.dtype)
        activate(
            *(level, threads(), x.dtype is torch.bfloat16, out.data_ptr(), x.data_ptr()),
            *(out.numel() // size, size, size, ACTIVATIONS[kind], gated),
        )
        return out

    @act.on("cpu", *BOTH)
    def act_native(x: Tensor, kind: str) -> Tensor:
        return activated(x, kind, False)

    @act_mul.on("cpu", *BOTH)
    def act_mul_native(x: Tensor, kind: str) -> Tensor:
        return activated(x, kind, True)


def _register_lookups(library: ctypes.CDLL, level: int, threads: Callable[[], int]) -> None:
    find, choose = kernel("quire_embed"), kernel("quire_pick")

    @embed.on("cpu", torch.int64)
    def embed_native(ids: Tensor, table: Tensor | PackedWeight, scale: float = 1.0) -> Tensor:
        packed = isinstance(table, PackedWeight)
        data, size = (
            (table.data, table.inputs) if isinstance(table, PackedWeight) else (table, table.shape[1])
        )
        if data.dtype not in BOTH or not data.is_contiguous():
            return embed.reference(ids, table, scale)
        ids = ids.contiguous()
        out = torch.empty((*ids.shape, size), dtype=data.dtype)
        find(
            *(level, threads(), data.dtype is torch.bfloat16, out.data_ptr(), data.data_ptr()),
            *(ids.data_ptr(), ids.numel(), size, data.shape[2] if packed else 0, scale),
        )
        return out

    @as_table.on("cpu", *BOTH)
    def as_table_native(table: Tensor, weight: object) -> object:
        return weight if isinstance(weight, PackedWeight) and weight.groups == 1 else table

    @pick.on("cpu", torch.float32, torch.int64)
    def pick_native(table: Tensor, columns: Tensor) -> Tensor:
        if table.stride(1) != 1 or not columns.is_contiguous():
            return pick.reference(table, columns)
        out = torch.empty(len(table), len(columns), dtype=table.dtype)
        pointers = out.data_ptr(), table.data_ptr(), columns.data_ptr()
        choose(*pointers, *out.shape, table.stride(0), table.element_size())
        return out


if (_library := load()[0]) is not None:
    for _register in (
        _register_linear,
        _register_norms,
        _register_rotation,
        _register_activations,
        _register_lookups,
    ):
        _register(_library, isa(), torch.get_num_threads)
