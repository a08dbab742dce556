"""Calls of the compiled CPU sampling kernels, where the machine has them. Knows no slots and no requests."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from quire.kernels.cpu.native import library

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


@cache
def _functions() -> ctypes.CDLL | None:
    found = library()
    if found is not None:
        found.quire_draw.argtypes = [_POINTER, *[_LONG] * 3, *[_POINTER] * 8, _INT]
        found.quire_draw.restype = None
        found.quire_penalise.argtypes = [_POINTER, *[_LONG] * 2, _POINTER, _LONG, _POINTER, _INT]
        found.quire_penalise.restype = None
    return found


def draw(
    logits: Tensor, scale: Tensor, floats: tuple[Tensor, Tensor], ints: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor] | None:
    """Tokens and bad rows as `quire.sampling.draw.draw` has them, or None without the compiled library.

    `floats` are log_min_p and top_p [R] float32, `ints` are top_k, seeds and positions [R] int64.
    """
    functions = _functions()
    if functions is None:
        return None
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    num_rows, vocab_size = logits.shape
    columns = [x.contiguous() for x in (scale, *floats, *ints)]
    token_ids = torch.empty(num_rows, dtype=torch.int64)
    bad = torch.empty(num_rows, dtype=torch.bool)
    pointers = [x.data_ptr() for x in (*columns, token_ids, bad)]
    shape = (num_rows, vocab_size, logits.stride(0))
    functions.quire_draw(logits.data_ptr(), *shape, *pointers, torch.get_num_threads())
    return token_ids, bad


def penalise(logits: Tensor, slots: Tensor, addresses: Tensor) -> bool:
    """Do what `quire.sampling.penalties.penalise` does; False without the compiled library."""
    functions = _functions()
    if functions is None or logits.stride(-1) != 1:
        return False
    shape = (logits.stride(0), logits.shape[1])
    slots = slots.contiguous()
    given = (slots.data_ptr(), len(slots), addresses.data_ptr(), torch.get_num_threads())
    functions.quire_penalise(logits.data_ptr(), *shape, *given)
    return True
