"""Random workloads on a GPU against the same on the CPU, and how far bfloat16 takes the demo model from float32."""

import random
from typing import Any

import pytest
import torch

from quire.config import Config
from quire.engine.engine import Engine
from quire.types import OutputKind, SamplingParams
from tests.gpu.test_graphs import Asked, Got, compare, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 5},
    {"temperature": 0.8, "top_p": 0.9, "logprobs": 0},
    {"temperature": 1.0, "top_k": 30, "min_p": 0.01},
    {"temperature": 0.9, "repetition_penalty": 1.1, "presence_penalty": 0.3},
    {"temperature": 0.7, "logit_bias": {7: 2.0, 9: -5.0}, "min_tokens": 5},
    {"temperature": 0.0, "prompt_logprobs": 2},
    {"temperature": 1.0, "bad_words": ["the", "a fox"], "stop": ["."]},
]
TEXTS = (
    "What is the capital of France?",
    "Tell me a story about a fox and a crow who share a garden.",
    "List three colours, then count from one to ten, and say which day comes after Monday.",
)
# Of log probabilities of the prompt's tokens, against float32: bfloat16 keeps 8 bits of each number.
MEAN_ERROR, MOST_ERROR = 0.08, 0.4


def make_engine(device: str, **options: Any) -> Engine:
    base = {
        "model": "demo",
        "device": device,
        "dtype": "float32",
        "max_model_len": 320,
        "max_num_seqs": 12,
        "max_num_batched_tokens": 96,
        "kv_cache_memory_bytes": 64 << 20,
        "block_size": 16,
        "async_scheduling": True,
    }
    return Engine(Config.of(**base | options), offline=True)


def workload(seed: int, count: int = 24) -> Asked:
    """Prompts that share beginnings, are longer than a step, and come over time."""
    chance = random.Random(seed)
    common = [chance.randrange(3, 4000) for _ in range(100)]
    asked: Asked = []
    for i in range(count):
        own = [chance.randrange(3, 4000) for _ in range(chance.randrange(1, 120))]
        kind = KINDS[i % len(KINDS)]
        params = SamplingParams(
            **kind,
            n=1 if kind["temperature"] == 0 else chance.choice([1, 1, 2]),
            seed=chance.randrange(1000),
            max_tokens=max(chance.randrange(1, 60), kind.get("min_tokens", 1)),
            ignore_eos=bool(i % 3),
            output_kind=OutputKind.FINAL_ONLY,
        )
        asked.append((common[: chance.choice([0, 40, 100])] + own, params, chance.randrange(12)))
    return sorted(asked, key=lambda item: item[2])


def tokens_of(got: Got) -> Got:
    return {name: [(tokens, None) for tokens, _ in outputs] for name, outputs in got.items()}


def scores(got: Got) -> list[float]:
    """The log probabilities of the chosen tokens, in order."""
    found = []
    for name in sorted(got, key=int):
        for tokens, each in got[name]:
            found += [step[token].logprob for token, step in zip(tokens, each or [], strict=bool(each))]
    return found


@pytest.mark.parametrize("seed", range(3))
def test_a_gpu_answers_as_a_cpu(seed: int) -> None:
    """In float32, where only the order of sums differs: chunks, shared beginnings, preemption and all parameters."""
    asked = workload(seed)
    want = run(make_engine("cpu"), asked)
    roomy, tight = make_engine("cuda"), make_engine("cuda", kv_cache_memory_bytes=22 << 17)
    for name, engine in (("roomy", roomy), ("tight", tight)):
        got = run(engine, asked)
        assert compare(name, tokens_of(got), tokens_of(want), asked) >= 0.99
        pairs = [(a, b) for a, b in zip(scores(got), scores(want), strict=False)]
        if tokens_of(got) == tokens_of(want):
            assert max(abs(a - b) for a, b in pairs) < 1e-3
    assert tight.core.stats().num_preemptions > 0
    assert roomy.core.stats().cache_hits > 0


def prompt_scores(device: str, dtype: str) -> list[float]:
    engine = make_engine(device, dtype=dtype, max_num_batched_tokens=512)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    for i, text in enumerate(TEXTS):
        engine.add(engine.inputs.request(text, params, request_id=str(i)))
    found: dict[str, list[float]] = {}
    while not engine.idle:
        for output in engine.step():
            if output.finished:
                steps = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
                found[output.request_id] = [step[token].logprob for token, step in steps]
    return [score for name in sorted(found) for score in found[name]]


def test_bfloat16_is_near_float32() -> None:
    want = torch.tensor(prompt_scores("cpu", "float32"))
    for dtype in ("bfloat16", "float16"):
        error = (torch.tensor(prompt_scores("cuda", dtype)) - want).abs()
        print(f"  {dtype}: mean {error.mean():.4f}, most {error.max():.4f} of {len(want)}")
        assert error.mean() < MEAN_ERROR and error.max() < MOST_ERROR
