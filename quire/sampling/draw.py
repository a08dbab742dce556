"""One token per row from processed logits: temperature, filters, Gumbel-max. Knows no slots and no requests.

The token is argmax(logit / temperature + Gumbel noise) over the tokens that the filters keep: exactly a
draw from their softmax. The noise depends on seed, position and token alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quire.kernels.dispatch import op
from quire.parallel.vocabulary import Vocabulary
from quire.sampling import cuda, native, philox
from quire.sampling.filters import Filters, thresholds


class Controls(NamedTuple):
    """How to draw each row's token, each of shape [R]. The flags say what no row needs."""

    scale: Tensor  # float32: 1 / temperature; 0 for greedy rows
    filters: Filters
    seeds: Tensor  # int64
    positions: Tensor  # int64: the chosen token's index in its sequence, which counts the noise
    all_greedy: bool
    any_filter: bool


@op
def draw(logits: Tensor, controls: Controls, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Tokens [R] (int64) and whether each row is unusable [R] (bool), for everybody's `logits` [R, own] in float32.

    The logits stay as they are. A row is unusable if it holds NaN or +inf, or no finite value; its token is 0.
    """
    greatest, tokens = logits.max(-1)
    scores = greatest
    if not controls.all_greedy:
        noisy = logits * controls.scale[:, None]
        kept = logits > -torch.inf
        if controls.any_filter:
            kept &= noisy >= thresholds(noisy, controls.filters, vocabulary)[:, None]
        noisy += philox.noise(controls.seeds, controls.positions, vocabulary.own)
        found = noisy.masked_fill_(~kept, -torch.inf).max(-1)
        tokens = torch.where(controls.scale > 0, found.indices, tokens)
        scores = torch.where(controls.scale > 0, found.values, greatest)
    bad = ~vocabulary.greatest(greatest).isfinite()
    return vocabulary.best(scores, tokens + vocabulary.own.start).masked_fill(bad, 0), bad


@draw.on("cpu", torch.float32)
def draw_native(logits: Tensor, controls: Controls, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """The compiled kernel, where there is one."""
    filters = controls.filters
    ints = (filters.top_k, controls.seeds, controls.positions)
    drawn = native.draw(logits, controls.scale, (filters.log_min_p, filters.top_p), ints, vocabulary)
    return drawn or draw.reference(logits, controls, vocabulary)


@draw.on("cuda", torch.float32)
def draw_triton(logits: Tensor, controls: Controls, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """The Triton kernels, where there is triton."""
    return cuda.draw(logits, controls, vocabulary) or draw.reference(logits, controls, vocabulary)
