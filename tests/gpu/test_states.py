"""Networks that keep states on a GPU: the tokens of the CPU, in graphs; and kernels at the sizes of real ones."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quire import LLM, SamplingParams
from quire.kernels import ops
from quire.runner.fixed import FixedKind
from tests.engine.test_oracle import make_prompts
from tests.kernels.recurrences import Sizes, make, make_convolution
from tests.kernels.test_recurrent import run
from tests.models.cases import BY_NAME, VOCAB_SIZE, build_hf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
NAMES = (
    *("Lfm2", "Qwen3Next", "KimiLinear", "MiniMax", "Mamba2", "Jamba", "FalconH1", "RecurrentGemma"),
    *("BailingHybrid", "Zamba2"),
)
GPU, CPU = torch.device("cuda"), torch.device("cpu")
LARGE = (
    Sizes((700, 1, 0, 130, 64), 32, 16, 128, 128),  # Qwen3-Next
    Sizes((515, 3), 32, 32, 128, 128, per_channel=True),  # Kimi Linear
    Sizes((300, 1, 81), 80, 1, 128, 64, delta=False),  # Mamba-2
    Sizes((200, 17), 24, 1, 256, 64, delta=False),  # Falcon-H1
    Sizes((100, 30), 64, 64, 128, 128, delta=False),  # MiniMax
)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_the_cpu(name: str, tmp_path: Path) -> None:
    build_hf(BY_NAME[name], tmp_path)
    prompts = make_prompts(VOCAB_SIZE)
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    found = {}
    for device in ("cpu", "cuda"):
        with LLM(str(tmp_path), dtype="float32", device=device, skip_tokenizer_init=True) as llm:
            found[device] = [
                [o.outputs[0].token_ids for o in llm.generate(prompts, greedy, use_tqdm=False)]
                for _ in range(3)  # the second of a kind of step is captured, the third is a replay of all
            ]
            if device == "cuda":
                fixed = llm.engine.core.runner.fixed
                assert fixed is not None and not fixed.graphs.has_failed
                assert any(isinstance(kind, FixedKind) for kind in fixed.graphs.captured)
    assert found["cpu"] == found["cuda"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", LARGE, ids=str)
def test_matrices_of_real_networks(sizes: Sizes, dtype: torch.dtype) -> None:
    """Decays near 1, as networks have them: what is rounded adds up over hundreds of positions."""
    step = make(replace(sizes, num_padding=5), dtype, torch.float32)
    step = replace(step, decay=step.decay**0.05)
    want, left = run(ops.recurrence.reference, step, CPU)
    for in_chunks, near in ((False, 2e-5), (True, 5e-3)):
        y, states = run(ops.recurrence.kernels["cuda", dtype], step, GPU, in_chunks)
        loose = near + (8e-3 if dtype is torch.bfloat16 else 0.0)
        assert (y - want).norm() / want.norm() < loose
        assert (states - left).norm() / left.norm() < near


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_convolutions_of_real_networks(dtype: torch.dtype) -> None:
    args = make_convolution((700, 1, 130), 8192, 4, dtype, bias=True, num_padding=5)
    there = [x if x is None else x.clone().to(GPU) for x in args]
    y, want = ops.causal_conv(*there, True), ops.causal_conv.reference(*args, True)
    torch.testing.assert_close(y.cpu(), want, rtol=8e-3, atol=8e-3)
    assert torch.equal(there[3].cpu(), args[3])
