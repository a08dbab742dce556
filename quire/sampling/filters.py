"""Which tokens may be drawn: min_p, top_k and top_p as one threshold per row. Knows no slots and no requests.

All three keep the likeliest tokens, so a filter is a number: the least scaled logit that stays. Ties with it
stay too, so the result does not depend on how a sort orders equal values.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quire.parallel.vocabulary import Vocabulary

FIRST_LOOK = 512  # most nuclei are smaller; only larger ones cost a full sort


class Filters(NamedTuple):
    """One value per row, each of shape [R]. Off: log_min_p -inf, top_k the vocabulary's size, top_p 1."""

    log_min_p: Tensor  # float32
    top_k: Tensor  # int64
    top_p: Tensor  # float32

    def rows(self, index: Tensor) -> "Filters":
        return Filters(self.log_min_p[index], self.top_k[index], self.top_p[index])


def thresholds(scaled: Tensor, filters: Filters, vocabulary: Vocabulary) -> Tensor:
    """The least value that survives min_p, then top_k, then top_p, for each row of everybody's `scaled` [R, own]: [R].

    min_p keeps tokens at least min_p times as likely as the likeliest. top_k keeps the k likeliest. top_p
    keeps the fewest likeliest of what is left whose probabilities, renormalised, reach p.
    """
    size = vocabulary.size
    width = min(FIRST_LOOK, size)
    top, _ = vocabulary.likeliest(scaled, width)
    floor = top[:, 0] + filters.log_min_p
    weights = torch.where(scaled >= floor[:, None], (scaled - top[:, :1]).exp(), 0)
    mass = vocabulary.total(weights.sum(-1, dtype=torch.float64))
    found, complete = _search(top, size, filters, floor, mass)
    if width == size:
        return found
    if scaled.is_cuda:  # asking which rows need the sort would make the host wait
        ordered = vocabulary.gather(scaled).sort(descending=True).values
        return _search(ordered, size, filters, floor, mass)[0]
    rest = (~complete).nonzero()[:, 0]
    if len(rest):
        ordered = vocabulary.gather(scaled[rest]).sort(descending=True).values
        found[rest] = _search(ordered, size, filters.rows(rest), floor[rest], mass[rest])[0]
    return found


def _search(
    ordered: Tensor, vocab_size: int, filters: Filters, floor: Tensor, mass: Tensor
) -> tuple[Tensor, Tensor]:
    """Thresholds from each row's W first values in descending order [R, W], and whether W was enough [R].

    `floor` [R] is min_p's threshold, `mass` [R] the sum of exp(value - greatest) over all that it keeps.
    """
    width = ordered.shape[1]
    kth = ordered.gather(1, (filters.top_k.clamp(max=width) - 1)[:, None])[:, 0]
    floor = torch.where(filters.top_k <= width, torch.maximum(floor, kth), floor)
    kept = ordered >= floor[:, None]
    ends = ~kept[:, -1]  # all that min_p and top_k keep is among the W
    weights = torch.where(kept, (ordered - ordered[:, :1]).exp(), 0).to(torch.float64)
    upto = weights.cumsum(-1)
    no_top_k, no_top_p = filters.top_k >= vocab_size, filters.top_p >= 1
    goal = filters.top_p * torch.where(no_top_k, mass, upto[:, -1])
    nucleus = torch.where(kept & (upto - weights < goal[:, None]), ordered, torch.inf).amin(-1)
    known = torch.where(no_top_p, filters.top_k <= width, upto[:, -1] >= goal)
    complete = ends | (no_top_p & no_top_k) | (known & (no_top_k | no_top_p))
    return torch.where(no_top_p, floor, nucleus), complete
