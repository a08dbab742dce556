"""Which attention backend runs: the first in the platform's order that can, or the one the user forces."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from quire.attention.base import Backend, Divisible
from quire.attention.cpu import Cpu
from quire.attention.parted import NOT_DIVISIBLE
from quire.attention.reference import Reference
from quire.attention.triton.backend import Triton
from quire.errors import ConfigError
from quire.log import logger

BACKENDS: dict[str, type[Reference] | type[Cpu] | type[Triton]] = {
    b.name: b for b in (Cpu, Triton, Reference)
}


def select(
    order: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    *,
    forced: str | None = None,
    block_size: int | None = None,
    invariant: bool = False,
    quantized: bool = False,
    divisible: bool = False,
) -> Backend:
    """The backend to use, with blocks of `block_size` tokens or of its own choice, and a cache of int8 if `quantized`.

    Of an `invariant` one results do not depend on what shares the batch or on how prompts were cut into chunks. Of a
    `divisible` one several ranks can have a part of the cache each.

    Raises:
        ConfigError: `forced` names no backend, or one that cannot run here; the message says why.
    """
    if forced is not None and forced not in BACKENDS:
        raise ConfigError(f"attention_backend is {forced!r}; it must be one of {', '.join(sorted(BACKENDS))}")
    reasons: list[str] = []
    for name in order if forced is None else (forced,):
        backend = _make(name, block_size, invariant, quantized)
        reason = backend.why_not(dtype, device)
        if reason is None and invariant and not backend.invariant:
            reason = "with deterministic, results must not depend on the batch, and its results do"
        if reason is None and divisible and not isinstance(backend, Divisible):
            reason = f"it {NOT_DIVISIBLE}"
        if reason is None:
            return backend
        if forced is not None:
            raise ConfigError(
                f"attention_backend {name!r} cannot run here: {reason}; leave it unset to choose"
            )
        logger.info("attention backend %s is not used: %s", name, reason)
        reasons.append(f"{name}: {reason}")
    raise ConfigError(f"no attention backend runs {dtype} on {device}: {'; '.join(reasons)}")


def _make(name: str, block_size: int | None, invariant: bool, quantized: bool) -> Backend:
    kind: Callable[..., Backend] = partial(BACKENDS[name], quantized=quantized)
    if name == Triton.name:
        kind = partial(kind, invariant=invariant)
    return kind() if block_size is None else kind(block_size)
