"""On a GPU the same tokens are drawn as on a CPU, and the host waits for nothing."""

from typing import Any

import pytest
import torch

from quire.types import SamplingParams
from tests.sampling.remembering import Remembering

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),  # torch says it does not see all of them
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

VOCAB = 2003
GIVEN: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    {"top_p": 0.6},
    {"min_p": 0.1, "logprobs": 4},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"logit_bias": {5: 3.0, 77: -100.0}, "min_tokens": 4, "logprobs": -1},
    {"allowed_token_ids": list(range(500)), "temperature": 1.3},
]
BAD_WORDS = [[3], [4, 5], [6, 7, 8]]


def generate(device: torch.device, steps: int) -> list[list[int]]:
    sampler = Remembering(VOCAB, len(GIVEN), device)
    for slot, given in enumerate(GIVEN):
        params = SamplingParams(**given)
        sampler.admit(
            slot, params, seed=slot, prompt=[1, 2], outputs=[], stop_token_ids=[0], bad_words=BAD_WORDS
        )
    generator = torch.Generator().manual_seed(0)
    logits = [(torch.randn(len(GIVEN), VOCAB, generator=generator) * 2).to(device) for _ in range(steps)]
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        sampled = [
            sampler.sample(row, range(len(GIVEN)), [2 + step] * len(GIVEN)) for step, row in enumerate(logits)
        ]
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    hosts = [step.to_host() for step in sampled]
    assert not any(flag for host in hosts for flag in host.bad)
    return [host.token_ids for host in hosts]


def test_same_tokens_as_on_the_cpu_without_waiting() -> None:
    assert generate(torch.device("cuda"), 30) == generate(torch.device("cpu"), 30)


@pytest.mark.parametrize("vocab_size", [1000, 4096, 32_000, 128_256, 151_936, 262_144])
@pytest.mark.parametrize("given", [{"temperature": 0}, {}, {"top_p": 0.6}, {"temperature": 0.7, "top_k": 20}])
def test_the_likeliest_token_is_found_wherever_it_is(vocab_size: int, given: dict[str, Any]) -> None:
    """At the edges of chunks, in the last one, and anywhere: so much likelier than others that any draw takes it."""
    edges = [0, 1, 3, 4, 4095, 4096, 4099, vocab_size - 4097, vocab_size - 2, vocab_size - 1]
    generator = torch.Generator().manual_seed(0)
    tokens = [token for token in edges if 0 <= token < vocab_size]
    tokens += torch.randint(vocab_size, (50,), generator=generator).tolist()
    logits = torch.randn(len(tokens), vocab_size, generator=generator)
    logits[range(len(tokens)), tokens] = 60.0
    sampler = Remembering(vocab_size, len(tokens), torch.device("cuda"))
    for slot in range(len(tokens)):
        params = SamplingParams(**given)
        sampler.admit(slot, params, seed=slot, prompt=[1], outputs=[], stop_token_ids=[], bad_words=[])
    sampled = sampler.sample(logits.cuda(), range(len(tokens)), [1] * len(tokens))
    assert sampled.to_host().token_ids == tokens
