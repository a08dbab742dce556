"""Steps in fixed memory of networks that keep states: padding, ended rows, kept states and lost ones change nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from quire.engine.engine import Engine
from quire.types import OutputKind, SamplingParams
from tests.models.cases import BY_NAME, build_hf
from tests.runner.test_fixed import make_engine, mix, run

NAMES = (
    *("Lfm2", "Qwen3Next", "KimiLinear", "MiniMax", "Mamba2", "Jamba", "FalconH1", "RecurrentGemma"),
    *("BailingHybrid", "BailingMoeLinearV2", "Zamba", "Zamba2"),
)
SHARED = {"temperature": 0.0, "max_tokens": 14, "output_kind": OutputKind.FINAL_ONLY}
OPTIONS = {"max_num_seqs": 6, "max_num_batched_tokens": 16, "max_model_len": 48}


def work_of(engine: Engine, *, stop: bool) -> list:
    """Prompts that come over time and begin alike; of half of them a token that they would choose ends them."""
    prompts = [[3 + j % 9 for j in range(4 + 3 * i)] + [20 + i] for i in range(7)]
    free = SamplingParams(**SHARED, ignore_eos=True)
    asked = [(prompt, free, 2 * i) for i, prompt in enumerate(prompts)]
    if stop:
        found = run(engine, asked)
        for i in range(0, len(asked), 2):
            token = found[str(i)][0][0][3 + i]
            asked[i] = (prompts[i], SamplingParams(**SHARED, stop_token_ids=[token]), 2 * i)
    return [
        *asked,
        *((prompt, params, step + 30) for prompt, params, step in asked),
    ]  # states are kept by then


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("overlap", [False, True])
def test_fixed_steps_equal_others(name: str, overlap: bool, tmp_path: Path) -> None:
    """Whatever lies in the state of padding, a row that is nobody's."""
    build_hf(BY_NAME[name], tmp_path)
    plain, engine = (make_engine(str(tmp_path), **OPTIONS, async_scheduling=overlap) for _ in range(2))
    work = work_of(make_engine(str(tmp_path), **OPTIONS), stop=True)
    fixed, states = mix(engine).fixed, engine.core.runner.states
    assert states is not None
    nobody = engine.core.runner.state.nobody
    states.rows[nobody].fill_(255)  # NaN
    got = run(engine, work)
    assert got == run(plain, work)
    assert {got[str(i)][0][2] for i in range(len(work))} == {"stop", "length"}
    assert fixed.graphs.ready and not fixed.graphs.has_failed
    assert (states.rows[nobody] == 255).all()  # nobody reads it, nobody writes it


class Failing:
    """A network that fails at one of its calls, when its layers have gone on already."""

    def __init__(self, network: Any, at: int, error: Exception):
        self.network, self.left, self.error = network, at, error

    def __call__(self, *args: Any) -> Any:
        hidden = self.network(*args)
        self.left -= 1
        if not self.left:
            raise self.error
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.network.logits(hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory"), ValueError("no such kernel")], ids=str
)
@pytest.mark.parametrize("at", [1, 3, 6])
def test_a_step_that_fails_halfway_begins_its_sequences_again(
    error: Exception, at: int, tmp_path: Path
) -> None:
    build_hf(BY_NAME["Lfm2"], tmp_path)
    engine, plain = (make_engine(str(tmp_path), **OPTIONS) for _ in range(2))
    work = work_of(plain, stop=False)
    fixed = mix(engine).fixed
    fixed.model = Failing(fixed.model, at, error)  # type: ignore[assignment]
    assert run(engine, work) == run(plain, work)
    assert fixed.graphs.has_failed and fixed.model.left <= 0
    assert engine.core.stats().num_preemptions > plain.core.stats().num_preemptions
