"""What layers give up behind windows, on a GPU: with graphs and without, the tokens are Hugging Face's."""

from pathlib import Path

import pytest
import torch

from quire import LLM, SamplingParams
from tests.engine.test_oracle import make_prompts, reference
from tests.models.cases import BY_NAME, build_hf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
OPTIONS = {"dtype": "float32", "device": "cuda", "skip_tokenizer_init": True, "disable_log_stats": True}
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.mark.parametrize("batched", [16, 2048])
@pytest.mark.parametrize("name", ["Exaone4", "Gemma3", "Mistral"])
def test_tokens_are_those_of_hugging_face(name: str, batched: int, tmp_path: Path) -> None:
    model, prompts = build_hf(BY_NAME[name], tmp_path), make_prompts()
    want = [reference(model, prompt)[0] for prompt in prompts]
    options = OPTIONS | {"block_size": 16, "max_num_batched_tokens": batched, "max_num_seqs": 8}
    with LLM(str(tmp_path), **options) as llm:
        assert llm.engine.core.scheduler.pool.near is not None
        for _ in range(3):
            outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
            assert [o.outputs[0].token_ids for o in outputs] == want
        long = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        alone = [llm.generate(p[:20], long, use_tqdm=False)[0].outputs[0].token_ids for p in prompts[-4:]]
        together = llm.generate([p[:20] for p in prompts[-4:]], long, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in together] == alone
