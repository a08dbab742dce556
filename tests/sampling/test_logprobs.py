"""Log probabilities are log_softmax of the raw logits, whatever is done to them before the draw."""

import math

import pytest
import torch

from quire.parallel.vocabulary import Vocabulary
from quire.sampling.logprobs import prompt_logprobs
from quire.sampling.sampler import HostSampled, Sampler
from quire.types import SamplingParams

VOCAB = 40


def logits_of(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(3)) * 3 + 20


def run(all_params: list[SamplingParams], logits: torch.Tensor) -> HostSampled:
    sampler = Sampler(Vocabulary(VOCAB), torch.zeros(len(all_params) + 1, 8, dtype=torch.int32))
    for slot, params in enumerate(all_params):
        sampler.admit(
            slot, params, seed=slot, prompt=[1, 2], outputs=[3], stop_token_ids=[0], bad_words=[[4]]
        )
    return sampler.sample(logits.clone(), range(len(all_params)), [3] * len(all_params)).to_host()


def test_each_row_gets_what_it_asks_for() -> None:
    counts = [None, 0, 3, -1, 3, VOCAB + 5, None, 1]
    bias = {7: -50.0, 8: 5.0}
    all_params = [
        SamplingParams(logprobs=k, logit_bias=bias, repetition_penalty=1.5, top_p=0.9) for k in counts
    ]
    logits = logits_of(len(counts))
    sampled = run(all_params, logits)
    exact = logits.log_softmax(-1)
    for row, k in enumerate(counts):
        report = sampled.logprobs[row]
        if k is None:
            assert report is None
            continue
        assert report is not None
        chosen = sampled.token_ids[row]
        likeliest = exact[row].argsort(descending=True).tolist()[: VOCAB if k == -1 else k]
        assert report.token_ids == [chosen] + [token for token in likeliest if token != chosen]
        torch.testing.assert_close(torch.tensor(report.logprobs), exact[row][report.token_ids])
        ranks = [1 + int((exact[row] > exact[row, token]).sum()) for token in report.token_ids]
        assert report.ranks == ranks


def test_prompt() -> None:
    logits = logits_of(9)
    next_tokens = torch.arange(9) * 4
    exact = logits.log_softmax(-1)
    reports = prompt_logprobs(logits, next_tokens, 2, Vocabulary(logits.shape[1])).to_lists()
    assert len(reports) == 9
    for row, report in enumerate(reports):
        token = int(next_tokens[row])
        assert report.token_ids[0] == token
        assert report.ranks[0] == 1 + int((exact[row] > exact[row, token]).sum())
        top = exact[row].topk(2).indices.tolist()
        assert report.token_ids[1:] == [other for other in top if other != token]
        torch.testing.assert_close(torch.tensor(report.logprobs), exact[row][report.token_ids])


def test_prompt_in_low_precision_is_computed_in_float32() -> None:
    logits = logits_of(4).bfloat16()
    reports = prompt_logprobs(logits, torch.tensor([5, 6, 7, 8]), 0, Vocabulary(logits.shape[1])).to_lists()
    exact = logits.float().log_softmax(-1)[range(4), [5, 6, 7, 8]]
    torch.testing.assert_close(torch.tensor([report.logprobs[0] for report in reports]), exact)


def test_precise_for_large_logits() -> None:
    logits = torch.tensor([[10_000.0, 10_000.5, 9_999.0]])
    report = prompt_logprobs(logits, torch.tensor([0]), 0, Vocabulary(logits.shape[1])).to_lists()[0]
    assert report.logprobs[0] == pytest.approx(float(logits.double().log_softmax(-1)[0, 0]), abs=1e-6)


def test_masked_tokens_have_no_probability() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]])
    report = prompt_logprobs(logits, torch.tensor([1]), -1, Vocabulary(4)).to_lists()[0]
    assert report.token_ids[0] == 1
    assert report.logprobs[0] == -math.inf
    assert report.ranks[0] == 3


def test_equal_tokens_share_a_rank_and_appear_once() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0]])
    for token in (1, 2, 3):
        report = prompt_logprobs(logits, torch.tensor([token]), 4, Vocabulary(4)).to_lists()[0]
        assert sorted(report.token_ids) == [0, 1, 2, 3]
        assert report.token_ids[0] == token
        assert report.ranks[0] == 1
