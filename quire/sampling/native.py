"""Calls of the compiled CPU sampling kernels, where the machine has them. Knows no slots and no requests."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from quire.kernels.cpu.calls import Kernel, kernel
from quire.kernels.cpu.native import library
from quire.models.shard import TOKENS
from quire.parallel.shared_memory import SharedMemory
from quire.parallel.vocabulary import Vocabulary


class Kernels(NamedTuple):
    """Those of the library that this module calls."""

    draw: Kernel
    draw_together: Kernel
    exclude: Kernel
    penalise: Kernel


@cache
def _kernels() -> Kernels | None:
    return None if library() is None else Kernels(*(kernel(f"quire_{name}") for name in Kernels._fields))


def draw(
    logits: Tensor,
    scale: Tensor,
    floats: tuple[Tensor, Tensor],
    ints: tuple[Tensor, Tensor, Tensor],
    vocabulary: Vocabulary,
) -> tuple[Tensor, Tensor] | None:
    """Tokens and bad rows as `quire.sampling.draw.draw` has them, or None without the compiled library.

    And None for ranks that share no memory. `floats` are log_min_p and top_p [R] float32, `ints` are top_k, seeds and
    positions [R] int64.
    """
    kernels, others = _kernels(), vocabulary.axis.communicator
    if kernels is None:
        return None
    if others is not None and (not isinstance(others, SharedMemory) or vocabulary.share % TOKENS):
        return None
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    num_rows, count = logits.shape
    columns = [x.contiguous() for x in (scale, *floats, *ints)]
    token_ids = torch.empty(num_rows, dtype=torch.int64)
    bad = torch.empty(num_rows, dtype=torch.bool)
    pointers = [x.data_ptr() for x in (*columns, token_ids, bad)]
    call = (logits.data_ptr(), num_rows, count, logits.stride(0), *pointers, torch.get_num_threads())
    if others is None:
        kernels.draw(*call)
    elif num_rows:
        own = (vocabulary.own.start, vocabulary.share, vocabulary.size)
        kernels.draw_together(*others.place, *call, *own)
        others.check()
    return token_ids, bad


def exclude(logits: Tensor, addresses: Tensor, own: range) -> bool:
    """Do what `quire.sampling.masks.exclude` does; False without the compiled library."""
    kernels = _kernels()
    if kernels is None or logits.stride(-1) != 1:
        return False
    shape = (len(logits), logits.shape[1], logits.stride(0))
    kernels.exclude(logits.data_ptr(), *shape, addresses.data_ptr(), own.start, torch.get_num_threads())
    return True


def penalise(logits: Tensor, slots: Tensor, addresses: Tensor) -> bool:
    """Do what `quire.sampling.penalties.penalise` does; False without the compiled library."""
    kernels = _kernels()
    if kernels is None or logits.stride(-1) != 1:
        return False
    shape = (logits.stride(0), logits.shape[1])
    slots = slots.contiguous()
    given = (slots.data_ptr(), len(slots), addresses.data_ptr(), torch.get_num_threads())
    kernels.penalise(logits.data_ptr(), *shape, *given)
    return True
