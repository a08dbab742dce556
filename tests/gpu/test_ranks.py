"""Networks that two GPUs compute: the tokens of one, with graphs of steps and without."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quire import LLM, SamplingParams
from quire.config import Config
from quire.engine.ranks import Team
from quire.engine.remote import RemoteEngine
from quire.runner.graphs import Graphs
from tests.engine.test_oracle import make_prompts
from tests.engine.test_remote import collect, running
from tests.models.cases import BY_NAME, VOCAB_SIZE, build_hf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
PROMPTS = make_prompts(VOCAB_SIZE)
LENGTH = {"max_tokens": 12, "ignore_eos": True}
PARAMS = {
    "greedy": SamplingParams(temperature=0, **LENGTH),
    "drawn": SamplingParams(temperature=1.1, seed=5, n=2, **LENGTH),
    "filtered": SamplingParams(temperature=1.1, top_p=0.8, top_k=20, seed=5, **LENGTH),
    "penalised": SamplingParams(temperature=0, repetition_penalty=1.3, min_tokens=4, **LENGTH),
    "scored": SamplingParams(temperature=0, logprobs=3, prompt_logprobs=2, **LENGTH),
}


def answers(folder: Path, size: int, backend: str) -> dict[str, object]:
    """Thrice: steps run first, are captured then, and are replayed."""
    options = {"dtype": "float32", "device": "cuda", "skip_tokenizer_init": True, "block_size": 16}
    with LLM(
        str(folder), **options, attention_backend=backend, tensor_parallel_size=size, max_num_seqs=16
    ) as llm:
        found = {}
        for name, params in PARAMS.items():
            for turn in range(3):
                outputs = llm.generate(PROMPTS, params, use_tqdm=False)
                found[f"{name} {turn}"] = [[c.token_ids for c in o.outputs] for o in outputs]
        runner = llm.engine.core.runner
        assert isinstance(runner, Team) is (size > 1)
        if isinstance(runner, Team):
            runner = runner.runner
        if backend == "reference":
            assert runner.fixed is None
        else:
            assert runner.fixed is not None and isinstance(graphs := runner.fixed.graphs, Graphs)
            assert graphs.captured and not graphs.has_failed
    return found


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ["Qwen3", "Qwen3Moe", "DeepseekV3"])
def test_tokens_are_those_of_one_gpu(name: str, backend: str, tmp_path: Path) -> None:
    build_hf(BY_NAME[name], tmp_path)
    assert answers(tmp_path, 2, backend) == answers(tmp_path, 1, backend)


MESHES = {
    "stages": {"pipeline_parallel_size": 2},
    "whole experts": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    "positions": {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
}


@pytest.mark.parametrize("mesh", MESHES)
def test_tokens_are_those_of_one_gpu_on_every_mesh(mesh: str, tmp_path: Path) -> None:
    build_hf(BY_NAME["DeepseekV3"], tmp_path)
    options = {"dtype": "float32", "device": "cuda", "skip_tokenizer_init": True, "block_size": 16}
    found = []
    for axes in ({}, MESHES[mesh]):
        with LLM(str(tmp_path), **options, **axes, max_num_seqs=16) as llm:
            turns = [
                llm.generate(PROMPTS, params, use_tqdm=False) for params in PARAMS.values() for _ in range(2)
            ]
        found.append([[[c.token_ids for c in o.outputs] for o in outputs] for outputs in turns])
    assert found[0] == found[1]


@pytest.mark.parametrize("lockstep", [False, True])
def test_groups_say_what_one_says_a_gpu_each(lockstep: bool, tmp_path: Path) -> None:
    build_hf(BY_NAME["Qwen3Moe"], tmp_path)
    options = {"dtype": "float32", "device": "cuda", "skip_tokenizer_init": True, "block_size": 16}
    one = Config(model=str(tmp_path), **options, max_num_seqs=16)
    two = replace(one, data_parallel_size=2, enable_expert_parallel=lockstep)

    async def work() -> None:
        found = []
        for config in (one, two):
            async with running(config) as engine:
                found.append(await asyncio.gather(*(tokens_of(engine, prompt) for prompt in PROMPTS)))
        assert found[0] == found[1]

    asyncio.run(work())


async def tokens_of(engine: RemoteEngine, prompt: list[int]) -> list[int]:
    outputs = await collect(engine, prompt, PARAMS["greedy"])
    return outputs[-1].outputs[0].token_ids
