"""Which attention backend runs: the first in the platform's order that can, or the one the user forces."""

from collections.abc import Sequence

import torch

from quire.attention.base import Backend
from quire.attention.cpu import Cpu
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
) -> Backend:
    """The backend to use, with blocks of `block_size` tokens or of its own choice.

    Raises:
        ConfigError: `forced` names no backend, or one that cannot run here; the message says why.
    """
    if forced is not None and forced not in BACKENDS:
        raise ConfigError(f"attention_backend is {forced!r}; it must be one of {', '.join(sorted(BACKENDS))}")
    for name in order if forced is None else (forced,):
        backend = BACKENDS[name]() if block_size is None else BACKENDS[name](block_size)
        reason = backend.why_not(dtype, device)
        if reason is None:
            return backend
        if forced is not None:
            raise ConfigError(
                f"attention_backend {name!r} cannot run here: {reason}; leave it unset to choose"
            )
        logger.info("attention backend %s is not used: %s", name, reason)
    raise ConfigError(f"no attention backend of {', '.join(order)} runs {dtype} on {device}")
