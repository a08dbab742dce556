"""What is drawn follows the exact distribution: chi-square tests on fixed seeds, over many positions."""

import math
from typing import Any

import pytest
import torch

from quire.parallel.vocabulary import Vocabulary
from quire.sampling.sampler import Sampler
from quire.types import SamplingParams

VOCAB = 12
DRAWS = 6000
PROMPT = [1, 2, 3]
OUTPUTS = [4, 4, 5]
LOGITS = torch.tensor([1.0, 0.2, -0.5, 2.0, 1.7, 1.2, -1.0, 0.0, 0.7, -2.5, 1.9, -math.inf])


def critical(freedom: int) -> float:
    """The 99.9 % quantile of chi-square (Wilson and Hilferty, 1931)."""
    part = 2 / (9 * freedom)
    return freedom * (1 - part + 3.0902 * math.sqrt(part)) ** 3


def statistic(counts: torch.Tensor, probs: torch.Tensor) -> tuple[float, int]:
    """Chi-square and its degrees of freedom; cells that expect fewer than 5 are merged."""
    expected = probs.double() * counts.sum()
    assert counts[expected == 0].sum() == 0
    small = expected < 5
    counts = torch.cat((counts[~small].double(), counts[small].sum().double()[None]))
    expected = torch.cat((expected[~small], expected[small].sum()[None]))
    counts, expected = counts[expected > 0], expected[expected > 0]
    return float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1


def assert_follows(counts: torch.Tensor, probs: torch.Tensor) -> None:
    found, freedom = statistic(counts, probs)
    assert freedom > 0
    assert found < critical(freedom)


def exact(params: SamplingParams) -> torch.Tensor:
    """The distribution by the definitions, token by token in float64, for PROMPT and OUTPUTS."""
    logits = LOGITS.double().clone()
    if params.allowed_token_ids is not None:
        for token in set(range(VOCAB)) - set(params.allowed_token_ids):
            logits[token] = -math.inf
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    for token in set(PROMPT) | set(OUTPUTS):
        factor = params.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token in set(OUTPUTS):
        count = OUTPUTS.count(token)
        logits[token] -= params.frequency_penalty * count + params.presence_penalty
    probs = (logits / params.temperature).softmax(0)
    probs[probs < params.min_p * probs.max()] = 0
    if 0 < params.top_k < VOCAB:
        probs[probs < probs.sort(descending=True).values[params.top_k - 1]] = 0
    probs /= probs.sum()
    ordered = probs.sort(descending=True)
    before = ordered.values.cumsum(0) - ordered.values
    probs[ordered.indices[before >= params.top_p]] = 0
    return probs / probs.sum()


def draw(params: SamplingParams, seed: int, positions: range) -> torch.Tensor:
    """One token at each position, from a slot of its own: a sequence taken back to its start each time."""
    count = len(positions)
    sampler = Sampler(Vocabulary(VOCAB), torch.zeros(count + 1, 8, dtype=torch.int32))
    for slot in range(count):
        sampler.admit(
            slot, params, seed=seed, prompt=PROMPT, outputs=OUTPUTS, stop_token_ids=[], bad_words=[]
        )
    sampled = sampler.sample(LOGITS.repeat(count, 1), range(count), positions)
    assert not sampled.bad.any()
    return sampled.token_ids


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"top_k": 4},
        {"top_k": 1000},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.6},
        {"frequency_penalty": 0.8},
        {"presence_penalty": -1.1},
        {"logit_bias": {0: 2.0, 3: -100.0, 9: 3.5}},
        {"allowed_token_ids": [0, 4, 6, 7, 11]},
        {"temperature": 0.8, "top_k": 6, "top_p": 0.8, "min_p": 0.05},
        {"top_k": 7, "top_p": 0.9, "frequency_penalty": 0.4, "presence_penalty": 0.3},
        {"top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.2, "logit_bias": {6: 3.0, 10: -1.0}},
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(given: dict[str, Any]) -> None:
    params = SamplingParams(**given)
    tokens = draw(params, 11, range(6, 6 + DRAWS))
    assert_follows(tokens.bincount(minlength=VOCAB), exact(params))


def test_seeds_follow_it_too() -> None:
    """One position, many seeds in a row: n parallel sequences."""
    params = SamplingParams()
    sampler = Sampler(Vocabulary(VOCAB), torch.zeros(DRAWS + 1, 8, dtype=torch.int32))
    for slot in range(DRAWS):
        sampler.admit(
            slot, params, seed=slot, prompt=PROMPT, outputs=OUTPUTS, stop_token_ids=[], bad_words=[]
        )
    tokens = sampler.sample(LOGITS.repeat(DRAWS, 1), range(DRAWS), [6] * DRAWS).token_ids
    assert_follows(tokens.bincount(minlength=VOCAB), exact(params))


@pytest.mark.parametrize(
    ("seeds", "shift"), [((5, 5), 1), ((5, 5), 4), ((5, 6), 0), ((5, -5), 0), ((5, 5 + 2**32), 0)]
)
def test_pairs_are_independent(seeds: tuple[int, int], shift: int) -> None:
    """The joint distribution of draws at nearby positions, or of nearby seeds, is the product."""
    params = SamplingParams(top_k=5)
    first = draw(params, seeds[0], range(6, 6 + DRAWS))
    second = draw(params, seeds[1], range(6 + shift, 6 + shift + DRAWS))
    probs = exact(params)
    joint = (first * VOCAB + second).bincount(minlength=VOCAB * VOCAB)
    assert_follows(joint, (probs[:, None] * probs).flatten())


def test_statistic_notices_a_wrong_distribution() -> None:
    tokens = draw(SamplingParams(temperature=1.1), 11, range(6, 6 + DRAWS))
    found, freedom = statistic(tokens.bincount(minlength=VOCAB), exact(SamplingParams()))
    assert found > critical(freedom)
