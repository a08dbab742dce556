"""Networks that two GPUs compute: the tokens of one, with graphs of steps and without."""

from pathlib import Path

import pytest
import torch

from quire import LLM, SamplingParams
from quire.engine.ranks import Team
from tests.engine.test_oracle import make_prompts
from tests.models.cases import BY_NAME, VOCAB_SIZE, build_hf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
PROMPTS = make_prompts(VOCAB_SIZE)
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.1, seed=5, n=2, max_tokens=24, ignore_eos=True)
PARAMS = {
    "greedy": GREEDY,
    "drawn": DRAWN,
    "filtered": SamplingParams(temperature=1.1, top_p=0.8, top_k=20, seed=5, max_tokens=24, ignore_eos=True),
    "penalised": SamplingParams(temperature=0, repetition_penalty=1.3, min_tokens=4, max_tokens=24),
    "scored": SamplingParams(temperature=0, logprobs=3, prompt_logprobs=2, max_tokens=12, ignore_eos=True),
}


def answers(folder: Path, size: int) -> dict[str, object]:
    """Twice, so that the second time steps are repeated where they can be."""
    options = {"dtype": "float32", "device": "cuda", "skip_tokenizer_init": True, "block_size": 16}
    with LLM(str(folder), **options, tensor_parallel_size=size, max_num_seqs=16) as llm:
        assert isinstance(llm.engine.core.runner, Team) is (size > 1)
        found = {}
        for name, params in PARAMS.items():
            for turn in range(2):
                outputs = llm.generate(PROMPTS, params, use_tqdm=False)
                found[f"{name} {turn}"] = [[c.token_ids for c in o.outputs] for o in outputs]
    return found


@pytest.mark.parametrize("name", ["Qwen3", "Qwen2Moe", "DeepseekV3"])
def test_tokens_are_those_of_one_gpu(name: str, tmp_path: Path) -> None:
    build_hf(BY_NAME[name], tmp_path)
    assert answers(tmp_path, 2) == answers(tmp_path, 1)
