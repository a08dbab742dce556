"""Kernels that were compiled ahead without touching the GPU are those that an engine launches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.shapes import SHAPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
ENGINE = """
import json, sys
from triton import knobs
from quire import LLM, SamplingParams
from quire.engine import device
from quire.engine.precompile import Precompiler

class Waited(Precompiler):  # the engine's own job, but done before the first step
    def __init__(self, job, done):
        super().__init__(job, done, num_processes=8)
        assert self.wait() == [0] * 8

device.Precompiler = Waited
missed, found = [], []
def listen(*, src, cache_hit, **_):
    (found if cache_hit else missed).append(src.name)
knobs.compilation.listener = listen
with LLM(sys.argv[1], load_format="dummy", device="cuda", skip_tokenizer_init=True, max_model_len=4096,
         gpu_memory_utilization=0.3) as llm:
    for count in (1, 3, 20, 100):
        for temperature in (0, 1):
            params = SamplingParams(max_tokens=4, temperature=temperature, ignore_eos=True)
            llm.generate([[i + 1] * (5 + i) for i in range(count)], params, use_tqdm=False)
print(json.dumps([missed, found]))
"""


@pytest.mark.parametrize("model", ["8B", "0.6B"])
def test_an_engine_compiles_nothing_that_was_compiled_ahead(model: str, tmp_path: Path) -> None:
    """Two layers: kernels do not depend on how many there are."""
    (tmp_path / "config.json").write_text(json.dumps({**SHAPES[model], "num_hidden_layers": 2}))
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "kernels")}
    ended = subprocess.run(
        [sys.executable, "-c", ENGINE, str(tmp_path)], env=env, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    missed, found = json.loads(ended.stdout.splitlines()[-1])
    assert missed == []
    assert {"decode", "stream", "one_row"} <= set(found)
