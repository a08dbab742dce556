"""Thresholds keep the tokens that a plain sort keeps."""

import math

import pytest
import torch

from quire.parallel.vocabulary import Vocabulary
from quire.sampling.filters import Filters, thresholds


def kept_by_sort(scaled: torch.Tensor, min_p: float, top_k: int, top_p: float) -> set[int]:
    """One row, token by token, in float64."""
    probs = scaled.double().softmax(-1)
    order = [i for i in scaled.argsort(descending=True).tolist() if probs[i] >= min_p * probs.max()]
    kth = scaled[order[min(top_k, len(order)) - 1]]
    order = [i for i in order if scaled[i] >= kth]
    mass = probs[order].cumsum(0) / probs[order].sum()
    last = min(int((mass < top_p - 1e-9).sum()), len(order) - 1) if top_p < 1 else len(order) - 1
    return {i for i in range(len(scaled)) if scaled[i] >= scaled[order[last]] and i in order}


CASES = [
    (0.0, 0, 1.0),
    (0.05, 0, 1.0),
    (0.0, 1, 1.0),
    (0.0, 7, 1.0),
    (0.0, 700, 1.0),
    (0.0, 0, 0.01),
    (0.0, 0, 0.5),
    (0.0, 0, 0.93),
    (0.0, 40, 0.6),
    (0.0, 600, 0.97),
    (0.02, 30, 0.9),
    (1.0, 30, 0.9),
]


@pytest.mark.parametrize("vocab_size", [3, 50, 1500])
@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_thresholds(vocab_size: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    cases = [(p, k if 0 < k < vocab_size else vocab_size, q) for p, k, q in CASES]
    scaled = torch.randn(len(cases), vocab_size, generator=generator) * spread
    filters = Filters(
        torch.tensor([math.log(p) if p else -math.inf for p, _, _ in cases]),
        torch.tensor([k for _, k, _ in cases]),
        torch.tensor([q for _, _, q in cases]),
    )
    found = thresholds(scaled, filters, Vocabulary(scaled.shape[1]))
    for row, case in enumerate(cases):
        kept = set((scaled[row] >= found[row]).nonzero()[:, 0].tolist())
        assert kept == kept_by_sort(scaled[row], *case), case


def test_ties_stay_together() -> None:
    scaled = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]]).repeat(2, 1)
    filters = Filters(torch.full((2,), -math.inf), torch.tensor([2, 5]), torch.tensor([1.0, 0.6]))
    assert thresholds(scaled, filters, Vocabulary(scaled.shape[1])).tolist() == [1.0, 1.0]


def test_ties_that_go_on_past_the_first_look() -> None:
    scaled = torch.zeros(1, 1200)
    scaled[0, 0] = 1.0
    filters = Filters(torch.tensor([-math.inf]), torch.tensor([100]), torch.tensor([0.5]))
    assert thresholds(scaled, filters, Vocabulary(scaled.shape[1])).tolist() == [0.0]
