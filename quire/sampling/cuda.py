"""Calls of the Triton kernels, where triton can be imported. Knows no slots and no requests.

They are imported at the first call: only a process with a GPU pays for that.
"""

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

from torch import Tensor

from quire.log import logger
from quire.parallel.vocabulary import Vocabulary

if TYPE_CHECKING:
    from quire.sampling.draw import Controls


@cache
def available() -> bool:
    """Whether there is triton; what is lost without it is logged, once."""
    found = find_spec("triton") is not None
    if not found:
        logger.warning("triton is not installed, and sampling runs in plain torch, several times slower")
    return found


def draw(logits: Tensor, controls: "Controls", vocabulary: Vocabulary) -> tuple[Tensor, Tensor] | None:
    """What `quire.sampling.draw.draw` returns, or None without triton."""
    if not available():
        return None
    from quire.sampling.triton.draw import draw

    return draw(logits, controls, vocabulary)


def restrict(logits: Tensor, slots: Tensor, positions: Tensor, tokens: Tensor, addresses: Tensor) -> bool:
    """Do what `quire.sampling.rules.restrict` does; False without triton, or for gaps between tokens."""
    if not available() or logits.stride(1) != 1:
        return False
    from quire.sampling.triton.rules import restrict

    restrict(logits, slots, positions, tokens, addresses)
    return True


def penalise(logits: Tensor, slots: Tensor, addresses: Tensor) -> bool:
    """Do what `quire.sampling.penalties.penalise` does; False without triton, or for gaps between tokens."""
    if not available() or logits.stride(1) != 1:
        return False
    from quire.sampling.triton.penalties import penalise

    penalise(logits, slots, addresses)
    return True


def count(slots: Tensor, token_ids: Tensor, addresses: Tensor, own: range) -> bool:
    """Do what `quire.sampling.penalties.count` does; False without triton."""
    if not available():
        return False
    from quire.sampling.triton.penalties import count

    count(slots, token_ids, addresses, own)
    return True


def score(logits: Tensor, chosen: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """What `quire.sampling.logprobs.score` returns, or None without triton or for a k that is better sorted."""
    if not available():
        return None
    from quire.sampling.triton.logprobs import MOST, score

    return score(logits, chosen, k) if k <= MOST else None
