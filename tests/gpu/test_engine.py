"""The engine on a GPU: the same tokens as Hugging Face, with steps planned ahead."""

from pathlib import Path

import pytest
import torch

from quire import LLM, SamplingParams
from tests.engine.test_oracle import NUM_OUTPUTS, make_prompts, reference
from tests.models.cases import BY_NAME, VOCAB_SIZE, build_hf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
BOTH = ("Llama", "Qwen3", "Gemma2", "Qwen3Moe", "DeepseekV3", "GPT2")
NATIVE = ("Llama4", "Gemma3n", "Gemma4", "Gemma4-experts", "DeepseekV32", "GlmMoeDsa", "Step3Text", "GptOss")
CASES = [(name, road) for name in BOTH for road in ("native", "transformers")]


@pytest.mark.parametrize(("name", "road"), [*CASES, *((name, "native") for name in NATIVE)])
def test_engine_equals_hugging_face(name: str, road: str, tmp_path: Path) -> None:
    model = build_hf(BY_NAME[name], tmp_path)
    prompts = make_prompts(VOCAB_SIZE)
    want = [reference(model, p)[0] for p in prompts]
    greedy = SamplingParams(temperature=0, max_tokens=NUM_OUTPUTS, ignore_eos=True)
    options = {"dtype": "float32", "device": "cuda", "skip_tokenizer_init": True, "block_size": 16}
    with LLM(str(tmp_path), **options, model_impl=road) as llm:
        assert llm.config.async_scheduling
        for _ in range(2):
            outputs = llm.generate(prompts, greedy, use_tqdm=False)
            assert [o.outputs[0].token_ids for o in outputs] == want


def test_sampling_equals_the_cpu(tmp_path: Path) -> None:
    build_hf(BY_NAME["Qwen3"], tmp_path)
    prompts = make_prompts(VOCAB_SIZE)
    params = SamplingParams(
        temperature=1.0, top_p=0.9, top_k=20, seed=7, max_tokens=12, repetition_penalty=1.1, n=2
    )
    found = {}
    for device in ("cpu", "cuda"):
        with LLM(str(tmp_path), dtype="float32", device=device, skip_tokenizer_init=True) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        found[device] = [[c.token_ids for c in o.outputs] for o in outputs]
    assert found["cpu"] == found["cuda"]
