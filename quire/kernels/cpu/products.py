"""Products with packed weights on a CPU (linear.cpp, quantized.cpp), and what is fused with them (finish.cpp).

Registered beside their references where the library was built. A result that is fused differs from that of separate
operations by what these would have rounded in between. Whether it is does not depend on the number of rows.
"""

import ctypes
import mmap
import sys
from collections.abc import Callable
from ctypes import c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quire.kernels.cpu.calls import kernel
from quire.kernels.cpu.native import isa, load
from quire.kernels.quantized import GROUP, Quantized, check, quantize_linear
from quire.kernels.reference import (
    RmsNorm,
    RowScale,
    linear,
    linear_add_norm,
    normed_act_mul,
    normed_linear,
    pack_linear,
)

BOTH = (torch.float32, torch.bfloat16)
ACTIVATIONS = {  # as in elementwise.h
    "silu": 0,
    "gelu_pytorch_tanh": 1,
    "gelu_new": 1,
    "gelu": 2,
    "relu": 3,
    "relu2": 4,
    "sigmoid": 5,
    "swiglu_oai": 6,
}
BLOCK_OUTPUTS, INPUT_STEP, UNIT_BYTES = 64, 32, 4  # as in linear.cpp
MOST_HEAD_DIM = 4 * BLOCK_OUTPUTS  # as in finish.h


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


class Fused(NamedTuple):
    """What a call does besides a product, as finish.h has it: addresses, 0 for none, and numbers."""

    squares: int = 0
    residual: int = 0
    total: int = 0
    new_squares: int = 0
    gain: int = 0
    heads: int = 0
    num_squares: int = 0
    residual_stride: int = 0
    eps: float = 0.0
    offset: float = 0.0
    residual_bf16: bool = False
    gated: bool = False
    activation: int = 0

    @classmethod
    def scaled(cls, scale: RowScale | None, **more: Any) -> "Fused":
        """With rows that a norm left unscaled, if it did. The squares must lie side by side."""
        if scale is None:
            return cls(**more)
        return cls(scale.squares.data_ptr(), num_squares=scale.squares.shape[1], eps=scale.eps, **more)


class Machine(NamedTuple):
    """What runs a kernel: an instruction set (native.isa), on so many threads."""

    level: int
    threads: int


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def rows_of(x: Tensor) -> tuple[Tensor, int, int]:
    """(x with the numbers of a row side by side, its rows, numbers from a row to the next)."""
    if x.dim() != 2 or x.stride(1) != 1:
        x = x.contiguous()
    size = x.shape[-1]
    return x, x.numel() // size, x.stride(0) if x.dim() == 2 else size


def multiply(
    x: Tensor,
    weight: PackedWeight | PackedQuantized,
    bias: Tensor | None,
    out: Tensor,
    machine: Machine,
    fused: Fused = Fused(),  # noqa: B008  (it is a value)
) -> None:
    """out = x @ weight.T + bias, and what else is asked for; x as `linear` takes it."""
    bf16, out_bf16 = x.dtype is torch.bfloat16, out.dtype is torch.bfloat16
    if isinstance(weight, PackedQuantized):
        x, rows, stride = rows_of(x)
        kernel("quire_linear_quantized")(
            *(*machine, weight.bits, bf16, out_bf16, out.data_ptr(), x.data_ptr()),
            *(weight.data.data_ptr(), weight.scales.data_ptr(), pointer(bias)),
            *(rows, weight.inputs, weight.outputs, weight.padded, stride * x.element_size()),
            *fused,
        )
        return
    grouped = weight.groups > 1
    if x.dim() != 2 + grouped or x.stride(-1) != 1:
        x = x.contiguous()
    size, inputs = x.element_size(), x.shape[-1]
    rows = x.shape[0] if grouped else x.numel() // inputs
    stride = x.stride(0) if x.dim() == 2 + grouped else inputs
    kernel("quire_linear")(
        *(*machine, bf16, out_bf16, bf16),
        *(out.data_ptr(), x.data_ptr(), weight.data.data_ptr(), pointer(bias), 0, 0, 0),
        *(rows, weight.outputs, weight.data.shape[2], stride * size),
        *(weight.groups, x.stride(1) * size if grouped else 0, inputs * size),
        *fused,
    )


def takes_gain(gain: Tensor | None, x: Tensor) -> bool:
    """Whether kernels multiply rows of x by a norm's weight: they read one number a column, of x's type."""
    return gain is None or gain.dim() == 1 and gain.dtype is x.dtype


def takes_more(x: Tensor, weight: Any, scale: RowScale | None = None) -> bool:
    """Whether there is a kernel that does more than a product with such a weight."""
    if scale is not None and not scale.squares.is_contiguous():
        return False
    return x.dim() == 2 and (
        isinstance(weight, PackedQuantized) or isinstance(weight, PackedWeight) and weight.groups == 1
    )


def multiply_normed(
    values: Tensor,
    scale: RowScale | None,
    weight: Any,
    bias: Tensor | None,
    dtype: torch.dtype,
    machine: Machine,
) -> Tensor | None:
    """`normed_linear`; None if it takes several operations."""
    if not takes_more(values, weight, scale):
        return None
    out = torch.empty(len(values), weight.outputs, dtype=dtype)
    multiply(values, weight, bias, out, machine, Fused.scaled(scale))
    return out


def multiply_gated(
    values: Tensor, scale: RowScale | None, weight: Any, bias: Tensor | None, kind: str, machine: Machine
) -> Tensor | None:
    """`normed_act_mul`; None if it takes several operations."""
    if not takes_more(values, weight, scale) or weight.outputs % (2 * BLOCK_OUTPUTS):
        return None
    out = torch.empty(len(values), weight.outputs // 2, dtype=values.dtype)
    fused = Fused.scaled(scale, gated=True, activation=ACTIVATIONS[kind])
    multiply(values, weight, bias, out, machine, fused)
    return out


def multiply_added(
    x: Tensor, weight: Any, bias: Tensor | None, residual: Tensor, norm: RmsNorm, machine: Machine
) -> tuple[Tensor, Tensor, RowScale] | None:
    """`linear_add_norm`; None if it takes several operations."""
    gain, eps, offset = norm
    if not takes_gain(gain, x):
        return None
    if not takes_more(x, weight) or residual.dim() != 2 or residual.dtype not in BOTH:
        return None
    residual, rows, stride = rows_of(residual)
    total, out = (torch.empty(rows, weight.outputs, dtype=dtype) for dtype in (residual.dtype, x.dtype))
    squares = torch.empty(rows, -(-weight.outputs // BLOCK_OUTPUTS))
    fused = Fused(
        residual=residual.data_ptr(),
        total=total.data_ptr(),
        new_squares=squares.data_ptr(),
        gain=pointer(gain),
        residual_stride=stride,
        offset=offset,
        residual_bf16=residual.dtype is torch.bfloat16,
    )
    multiply(x, weight, bias, out, machine, fused)
    return total, out, RowScale(squares, eps)


def _register_weights(library: ctypes.CDLL, machine: Callable[[], Machine]) -> None:
    library.quire_pack_linear.argtypes = (c_int32, c_int32, c_void_p, c_void_p, *[c_int64] * 4)
    library.quire_quantize_weight.argtypes = (*[c_int32] * 4, *[c_void_p] * 3, *[c_int64] * 3)

    @pack_linear.on("cpu", *BOTH)
    def pack_linear_native(weight: Tensor, invariant: bool = False) -> PackedWeight:
        """The only form is an invariant one."""
        *heads, outputs, inputs = weight.shape
        groups, per_unit = heads[0] if heads else 1, UNIT_BYTES // weight.dtype.itemsize
        blocks, units = -(-outputs // BLOCK_OUTPUTS), -(-inputs // INPUT_STEP) * INPUT_STEP // per_unit
        data = torch.empty(groups, blocks, units, BLOCK_OUTPUTS, per_unit, dtype=weight.dtype)
        weight, bf16 = weight.contiguous(), weight.dtype is torch.bfloat16
        pointers = (weight.data_ptr(), data.data_ptr())
        library.quire_pack_linear(machine().threads, bf16, *pointers, outputs, inputs, units, groups)
        _ask_for_huge_pages(data)
        return PackedWeight(data, groups, outputs, inputs)

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
            *(*machine(), weight.dtype is torch.bfloat16, bits),
            *(data.data_ptr(), scales.data_ptr(), weight.data_ptr(), outputs, inputs, padded),
        )
        _ask_for_huge_pages(data)
        return PackedQuantized(data, scales, outputs, inputs, padded, bits)


def _ask_for_huge_pages(data: Tensor) -> None:
    """The system makes them of what is written already bit by bit, in the background; loading would wait for them."""
    if sys.platform == "linux":
        begin = data.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        size = data.data_ptr() + data.nbytes - begin
        ctypes.CDLL(None).madvise(c_void_p(begin), c_size_t(size), mmap.MADV_HUGEPAGE)


def _register_products(machine: Callable[[], Machine]) -> None:
    @linear.on("cpu", *BOTH)
    def linear_native(
        x: Tensor,
        weight: Tensor | PackedWeight | PackedQuantized | Quantized,
        bias: Tensor | None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        if isinstance(weight, Tensor | Quantized):
            return linear.reference(x, weight, bias, dtype)
        out = torch.empty((*x.shape[:-1], weight.outputs), dtype=dtype or x.dtype)
        multiply(x, weight, bias, out, machine())
        return out

    @normed_linear.on("cpu", *BOTH)
    def normed_linear_native(
        values: Tensor,
        scale: RowScale | None,
        weight: Any,
        bias: Tensor | None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        found = multiply_normed(values, scale, weight, bias, dtype or values.dtype, machine())
        return normed_linear.reference(values, scale, weight, bias, dtype) if found is None else found

    @normed_act_mul.on("cpu", *BOTH)
    def normed_act_mul_native(
        values: Tensor, scale: RowScale | None, weight: Any, bias: Tensor | None, kind: str
    ) -> Tensor:
        found = multiply_gated(values, scale, weight, bias, kind, machine())
        return normed_act_mul.reference(values, scale, weight, bias, kind) if found is None else found

    @linear_add_norm.on("cpu", *BOTH)
    def linear_add_norm_native(
        x: Tensor, weight: Any, bias: Tensor | None, residual: Tensor, norm: RmsNorm
    ) -> tuple[Tensor, Tensor, RowScale | None]:
        found = multiply_added(x, weight, bias, residual, norm, machine())
        return linear_add_norm.reference(x, weight, bias, residual, norm) if found is None else found


def _register(library: ctypes.CDLL, level: int) -> None:
    def machine() -> Machine:
        return Machine(level, torch.get_num_threads())

    _register_weights(library, machine)
    _register_products(machine)


if (_library := load()[0]) is not None:
    _register(_library, isa())
