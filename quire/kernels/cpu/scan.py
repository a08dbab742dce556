"""C++ kernels of convolutions over time and of Mamba's scan (scan.cpp), beside their references."""

from collections.abc import Callable

import torch
from torch import Tensor

from quire.kernels.cpu.calls import kernel
from quire.kernels.cpu.native import isa, load
from quire.kernels.cpu.products import BOTH, pointer, rows_of
from quire.kernels.recurrent import causal_conv, selective_scan

WIDTHS = (2, 3, 4)  # that scan.inl has convolutions of


def _register(level: int, threads: Callable[[], int]) -> None:
    convolve, scan = kernel("quire_causal_conv"), kernel("quire_selective_scan")

    @causal_conv.on("cpu", *BOTH)
    def causal_conv_native(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor,
        rows: Tensor,
        query_starts: Tensor,
        silu: bool,
    ) -> Tensor:
        width = weight.shape[1]
        alike = all(part.dtype is x.dtype for part in (weight, state, x if bias is None else bias))
        if width not in WIDTHS or not alike or not _are_plain(state, rows, query_starts, weight):
            return causal_conv.reference(x, weight, bias, state, rows, query_starts, silu)
        x, num_rows, stride = rows_of(x)
        out = torch.empty(x.shape, dtype=x.dtype)
        convolve(
            *(level, threads(), x.dtype is torch.bfloat16, silu, out.data_ptr(), x.data_ptr()),
            *(weight.data_ptr(), pointer(bias), state.data_ptr()),
            *(rows.data_ptr(), query_starts.data_ptr()),
            *(len(rows), num_rows, x.shape[1], width, stride, state.stride(0)),
        )
        return out

    @selective_scan.on("cpu", torch.float32)
    def selective_scan_native(
        x: Tensor,
        dt: Tensor,
        rate: Tensor,
        b: Tensor,
        c: Tensor,
        skip: Tensor,
        state: Tensor,
        rows: Tensor,
        query_starts: Tensor,
    ) -> Tensor:
        if not _are_plain(state, rows, query_starts, rate):
            return selective_scan.reference(x, dt, rate, b, c, skip, state, rows, query_starts)
        (x, num_rows, stride), *others = (rows_of(part) for part in (x, dt, b, c))
        out = torch.empty(x.shape, dtype=x.dtype)
        scan(
            *(level, threads(), out.data_ptr(), x.data_ptr(), others[0][0].data_ptr(), rate.data_ptr()),
            *(others[1][0].data_ptr(), others[2][0].data_ptr(), skip.data_ptr(), state.data_ptr()),
            *(rows.data_ptr(), query_starts.data_ptr()),
            *(len(rows), num_rows, x.shape[1], rate.shape[0], stride),
            *(step for _, _, step in others),
            state.stride(0),
        )
        return out


def _are_plain(state: Tensor, rows: Tensor, query_starts: Tensor, weight: Tensor) -> bool:
    """Whether kernels can take them: numbers lie side by side, those of one row of the state, too."""
    kinds = rows.dtype is torch.int64 and query_starts.dtype is torch.int32
    return kinds and all(part.is_contiguous() for part in (state[:1], rows, query_starts, weight))


if load()[0] is not None:
    _register(isa(), torch.get_num_threads)
