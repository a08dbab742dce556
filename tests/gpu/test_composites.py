"""Images whose tokens see each other, or have positions in three rows, on a GPU, with graphs and without."""

from pathlib import Path

import pytest
import torch

from quire import LLM
from tests.engine.test_coordinates import GREEDY, SECTIONED, WORK
from tests.engine.test_coordinates import PROMPTS as PLACED
from tests.engine.test_coordinates import continued as placed
from tests.gpu.test_windows import OPTIONS
from tests.models.composites import build
from tests.models.test_spans import NETWORKS, PROMPTS, Told, built, continued

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
ROOM = OPTIONS | {"block_size": 16, "max_num_seqs": 8, "kv_cache_memory_bytes": 64 << 20}


@pytest.mark.parametrize("batched", [48, 2048])
@pytest.mark.parametrize("told", NETWORKS.values(), ids=NETWORKS)
def test_images_see_each_other(told: Told, batched: int, tmp_path: Path) -> None:
    model = built(told, tmp_path)
    want = [continued(model, told, prompt) for prompt in PROMPTS]
    with LLM(str(tmp_path), **ROOM, max_num_batched_tokens=batched) as llm:
        for _ in range(3):
            outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
            assert [o.outputs[0].token_ids for o in outputs] == want


@pytest.mark.parametrize("batched", [9, 2048])
@pytest.mark.parametrize("name", ["Qwen2_5_VL-flat", "Qwen3VL"])
def test_tokens_have_positions_in_three_rows(name: str, batched: int, tmp_path: Path) -> None:
    model = build(SECTIONED[name], tmp_path)
    want = [placed(model, *each) for each in WORK]
    with LLM(str(tmp_path), **ROOM, max_num_batched_tokens=batched) as llm:
        for _ in range(3):
            outputs = llm.generate(PLACED, GREEDY, use_tqdm=False)
            assert [o.outputs[0].token_ids for o in outputs] == want
