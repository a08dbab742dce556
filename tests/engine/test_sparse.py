"""Attention to chosen positions through the engine: company, preemption and reuse change no token; who refuses it."""

from pathlib import Path

import pytest

from quire.attention.shapes import block_bytes
from quire.engine.engine import Engine
from quire.errors import ConfigError
from quire.types import SamplingParams
from tests.attention.test_backends import BUILT
from tests.engine.test_invariance import make_engine, run_alone, tokens_of
from tests.models.cases import BY_NAME, build_hf

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
PROMPTS = [[3 + (7 * i + 5 * j) % 90 for j in range(10 + 2 * i)] for i in range(6)]
OPTIONS = {"block_size": 16, "attention_backend": "cpu"} if BUILT else {}


@pytest.fixture(scope="module", params=["DeepseekV32", "GlmMoeDsa"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("sparse")
    build_hf(BY_NAME[request.param], path)
    return str(path)


def bytes_of_a_block(engine: Engine) -> int:
    return block_bytes(engine.core.runner.model.spec, engine.config.block_size or 0, 4)


def test_company_and_preemption_change_no_token(folder: str) -> None:
    alone = make_engine(folder, **OPTIONS, enable_prefix_caching=False)
    want = [run_alone(alone, prompt, GREEDY) for prompt in PROMPTS]
    blocks = 3 * -(-48 // (alone.config.block_size or 1))
    memory = {"max_model_len": 48, "kv_cache_memory_bytes": blocks * bytes_of_a_block(alone)}
    preemptions = 0
    for variant in (
        {"max_num_batched_tokens": 7, "max_num_seqs": 4},
        memory,
        memory | {"async_scheduling": True},
    ):
        engine = make_engine(folder, **OPTIONS, **variant)
        for i, prompt in enumerate(PROMPTS):
            engine.add(engine.inputs.request(prompt, GREEDY, request_id=str(i)))
        outputs = {}
        while not engine.idle:
            outputs.update({o.request_id: o for o in engine.step()})
        assert [tokens_of(outputs[str(i)]) for i in range(len(PROMPTS))] == want, variant
        preemptions += sum(o.metrics.num_preemptions for o in outputs.values())
    assert preemptions > 0


def test_a_cached_beginning_holds_what_choices_are_made_by(folder: str) -> None:
    prompt = [3 + 11 * j % 90 for j in range(40)]
    engine, fresh = (
        make_engine(folder, **OPTIONS),
        make_engine(folder, **OPTIONS, enable_prefix_caching=False),
    )
    run_alone(engine, [*prompt[:35], 3, 4], GREEDY)
    engine.add(engine.inputs.request(prompt, GREEDY, request_id="second"))
    outputs = [output for _ in range(30) for output in engine.step()]
    assert outputs[-1].num_cached_tokens == 35 // (engine.config.block_size or 1) * (
        engine.config.block_size or 1
    )
    assert tokens_of(outputs[-1]) == run_alone(fresh, prompt, GREEDY)


def test_steps_are_recorded_where_every_position_is_seen(folder: str) -> None:
    few, more = (make_engine(folder, **OPTIONS, max_model_len=length) for length in (6, 7))
    assert (few.core.runner.fixed is not None) == BUILT and more.core.runner.fixed is None
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    assert run_alone(few, [7, 30, 12], params) == run_alone(more, [7, 30, 12], params)


def test_a_cache_of_int8_is_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype is int8.*chooses positions.*leave it auto"):
        make_engine(folder, **OPTIONS, kv_cache_dtype="int8")
