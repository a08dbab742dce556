"""The C++ kernel of matrix states, registered beside its reference where the library was built."""

import torch
from torch import Tensor

from quire.kernels.cpu.calls import kernel
from quire.kernels.cpu.native import isa, load
from quire.kernels.cpu.products import BOTH, pointer
from quire.kernels.recurrent import recurrence

MOST_KEYS = 512  # dimensions, as in recurrence.cpp


def _rows(x: Tensor) -> Tensor:
    """x [T, H, D] with a token's numbers side by side."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _register() -> None:
    recur, level = kernel("quire_recurrence"), isa()

    @recurrence.on("cpu", *BOTH)
    def recurrence_native(
        v: Tensor,
        q: Tensor,
        k: Tensor,
        decay: Tensor,
        beta: Tensor | None,
        state: Tensor,
        rows: Tensor,
        query_starts: Tensor,
        in_chunks: bool = False,
    ) -> Tensor:
        (tokens, heads, dv), (_, key_heads, dk) = v.shape, k.shape
        if dk > MOST_KEYS or q.dtype not in BOTH or k.dtype is not q.dtype or not state[0].is_contiguous():
            return recurrence.reference(v, q, k, decay, beta, state, rows, query_starts)
        v, q, k, decay = _rows(v), _rows(q), _rows(k), decay.contiguous()
        beta = None if beta is None else beta.contiguous()
        rows, query_starts = rows.long().contiguous(), query_starts.int().contiguous()
        out = torch.empty(v.shape, dtype=v.dtype)
        recur(
            *(level, torch.get_num_threads(), v.dtype is torch.bfloat16, q.dtype is torch.bfloat16),
            *(out.data_ptr(), v.data_ptr(), q.data_ptr(), k.data_ptr(), decay.data_ptr(), pointer(beta)),
            *(state.data_ptr(), rows.data_ptr(), query_starts.data_ptr()),
            *(len(rows), tokens, heads, key_heads, dk, dv, decay.shape[2]),
            *(v.stride(0), q.stride(0), k.stride(0), state.stride(0)),
        )
        return out


if load()[0] is not None:
    _register()
