"""Grammars where several processes sample, steps overlap, or sequences make way: the tokens of one process."""

import pytest

from quire import LLM, SamplingParams
from tests.grammar.test_structured import AS_JSON, check

OPTIONS = {"model": "demo", "device": "cpu", "dtype": "float32", "disable_log_stats": True}
PARAMS = SamplingParams(max_tokens=120, seed=5, n=3, structured_outputs=AS_JSON)
PROMPTS = ["Tell me more.", "What is the capital of France?", "Hello"]


def tokens(**options: object) -> tuple[list[list[int]], int]:
    """Of all outputs; and preemptions."""
    with LLM(**OPTIONS, **{"kv_cache_memory_bytes": 64 << 20, **options}) as llm:
        found = [each for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False) for each in output.outputs]
        for each in found:
            check(each.text)
        return [each.token_ids for each in found], llm.engine.core.scheduler.num_preemptions


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    return tokens()[0]


def test_overlapping_steps(alone: list[list[int]]) -> None:
    assert tokens(async_scheduling=True)[0] == alone


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_several_processes(alone: list[list[int]], axis: str) -> None:
    assert tokens(**{axis: 2})[0] == alone


def test_preemption(alone: list[list[int]]) -> None:
    found, num_preemptions = tokens(kv_cache_memory_bytes=1 << 20, max_model_len=125)
    assert found == alone and num_preemptions > 0
