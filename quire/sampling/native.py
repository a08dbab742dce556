"""Calls of the compiled CPU sampling kernels, where the machine has them. Knows no slots and no requests."""

from functools import cache

import torch
from torch import Tensor

from quire.kernels.cpu.calls import Kernel, kernel
from quire.kernels.cpu.native import library


@cache
def _kernels() -> tuple[Kernel, Kernel] | None:
    return None if library() is None else (kernel("quire_draw"), kernel("quire_penalise"))


def draw(
    logits: Tensor, scale: Tensor, floats: tuple[Tensor, Tensor], ints: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor] | None:
    """Tokens and bad rows as `quire.sampling.draw.draw` has them, or None without the compiled library.

    `floats` are log_min_p and top_p [R] float32, `ints` are top_k, seeds and positions [R] int64.
    """
    kernels = _kernels()
    if kernels is None:
        return None
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    num_rows, vocab_size = logits.shape
    columns = [x.contiguous() for x in (scale, *floats, *ints)]
    token_ids = torch.empty(num_rows, dtype=torch.int64)
    bad = torch.empty(num_rows, dtype=torch.bool)
    pointers = [x.data_ptr() for x in (*columns, token_ids, bad)]
    shape = (num_rows, vocab_size, logits.stride(0))
    kernels[0](logits.data_ptr(), *shape, *pointers, torch.get_num_threads())
    return token_ids, bad


def penalise(logits: Tensor, slots: Tensor, addresses: Tensor) -> bool:
    """Do what `quire.sampling.penalties.penalise` does; False without the compiled library."""
    kernels = _kernels()
    if kernels is None or logits.stride(-1) != 1:
        return False
    shape = (logits.stride(0), logits.shape[1])
    slots = slots.contiguous()
    given = (slots.data_ptr(), len(slots), addresses.data_ptr(), torch.get_num_threads())
    kernels[1](logits.data_ptr(), *shape, *given)
    return True
