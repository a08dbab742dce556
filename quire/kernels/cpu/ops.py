"""C++ kernels for CPUs, registered beside their references where the library was built."""

from collections.abc import Callable

import torch
from torch import Tensor

from quire.kernels.cpu.calls import kernel
from quire.kernels.cpu.native import isa, load
from quire.kernels.cpu.products import ACTIVATIONS, BOTH, Fused, PackedWeight, pointer, rows_of, takes_gain
from quire.kernels.reference import (
    RmsNorm,
    RowScale,
    act,
    act_mul,
    add,
    add_norm,
    as_table,
    embed,
    finish_norm,
    norm_rope,
    pick,
    rms_norm,
)


def _register_norms(level: int, threads: Callable[[], int]) -> None:
    rms, add_normed, finish = (kernel(f"quire_{name}") for name in ("rms_norm", "add_norm", "finish_norm"))

    @rms_norm.on("cpu", *BOTH)
    def rms_norm_native(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
        size = x.shape[-1]
        if not takes_gain(weight, x):
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
        if x.dtype is not residual.dtype or not takes_gain(weight, x):
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

    @finish_norm.on("cpu", *BOTH)
    def finish_norm_native(values: Tensor, scale: RowScale | None) -> Tensor:
        if scale is None:
            return values
        x, out = values.contiguous(), torch.empty(values.shape, dtype=values.dtype)
        finish(
            *(level, threads(), x.dtype is torch.bfloat16, out.data_ptr(), x.data_ptr(), *x.shape),
            *Fused.scaled(scale),
        )
        return out


def _register_rotation(level: int, threads: Callable[[], int]) -> None:
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


def _register_activations(level: int, threads: Callable[[], int]) -> None:
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


def _register_lookups(level: int, threads: Callable[[], int]) -> None:
    find, choose = kernel("quire_embed"), kernel("quire_pick")

    @embed.on("cpu", torch.int64)
    def embed_native(
        ids: Tensor, table: Tensor | PackedWeight, scale: float = 1.0, first: int | None = None
    ) -> Tensor:
        packed = isinstance(table, PackedWeight)
        if isinstance(table, PackedWeight):
            data, count, size = table.data, table.outputs, table.inputs
        else:
            data, (count, size) = table, table.shape
        if data.dtype not in BOTH or not data.is_contiguous():
            return embed.reference(ids, table, scale, first)
        ids = ids.contiguous()
        out = torch.empty((*ids.shape, size), dtype=data.dtype)
        find(
            *(level, threads(), data.dtype is torch.bfloat16, out.data_ptr(), data.data_ptr()),
            *(ids.data_ptr(), ids.numel(), size, data.shape[2] if packed else 0, first or 0, count, scale),
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


if load()[0] is not None:
    for _register in (_register_norms, _register_rotation, _register_activations, _register_lookups):
        _register(isa(), torch.get_num_threads)
