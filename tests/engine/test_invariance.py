"""A request's tokens do not depend on when it came, what ran beside it, or how often it was preempted."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.config import Config
from quire.engine.build import build_core
from quire.engine.engine import Engine
from quire.errors import ConfigError
from quire.types import OutputKind, SamplingParams
from tests.attention.test_backends import needs_cpu
from tests.models.cases import BY_NAME, VOCAB_SIZE, build_hf

BLOCK_SIZE = 4


def block_bytes(engine: Engine) -> int:
    """Of a block and those beside it."""
    near = engine.core.scheduler.pool.near
    parts = near.parts if near else 0
    return engine.config.kv_cache_memory_bytes // engine.core.stats().num_blocks * (1 + parts)


def make_engine(folder: str, **options: object) -> Engine:
    base = {
        "dtype": "float32",
        "device": "cpu",
        "skip_tokenizer_init": True,
        "block_size": BLOCK_SIZE,
        "disable_log_stats": True,
    }
    return Engine(Config.of(model=folder, **base | options), offline=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("qwen3")
    build_hf(BY_NAME["Qwen3"], path)
    return str(path)


@pytest.fixture(scope="module")
def alone(folder: str) -> Engine:
    return make_engine(folder)


def tokens_of(output: object) -> list[list[int]]:
    return [o.token_ids for o in output.outputs]


def run_alone(engine: Engine, prompt: list[int], params: SamplingParams) -> list[list[int]]:
    engine.add(engine.inputs.request(prompt, params, request_id="alone"))
    last = None
    while not engine.idle:
        for output in engine.step():
            last = output
    return tokens_of(last)


params = st.builds(
    SamplingParams,
    n=st.integers(1, 3),
    temperature=st.sampled_from([0.7, 1.5]),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([0, 5]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 1000),
    max_tokens=st.integers(1, 12),
    min_tokens=st.integers(0, 1),
    stop_token_ids=st.lists(st.integers(3, VOCAB_SIZE - 1), max_size=8),
    output_kind=st.just(OutputKind.FINAL_ONLY),
)
greedy = st.builds(
    SamplingParams,
    temperature=st.just(0.0),
    max_tokens=st.integers(1, 12),
    output_kind=st.just(OutputKind.FINAL_ONLY),
)
LONG = SamplingParams(temperature=1.0, seed=9, max_tokens=20, ignore_eos=True, repetition_penalty=1.2)
prompts = st.lists(st.integers(3, 6), min_size=1, max_size=20)
requests = st.lists(
    st.tuples(prompts, params | greedy, st.integers(0, 15), st.integers(-1, 1)), min_size=1, max_size=6
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    requests,
    st.sampled_from([1, 3, 16, 2048]),
    st.integers(1, 6),
    st.integers(9, 30),
    st.booleans(),
    st.booleans(),
)
def test_tokens_do_not_depend_on_company(
    folder: str, alone: Engine, work: list, batched: int, seqs: int, blocks: int, caching: bool, overlap: bool
) -> None:
    want = [run_alone(alone, prompt, p) for prompt, p, _, _ in work]
    engine = make_engine(
        folder,
        max_num_batched_tokens=batched,
        max_num_seqs=min(seqs, batched),
        kv_cache_memory_bytes=blocks * block_bytes(alone),
        max_model_len=32,
        enable_prefix_caching=caching,
        async_scheduling=overlap,
    )
    got: dict[str, list[list[int]]] = {}
    step, waiting = 0, sorted(enumerate(work), key=lambda item: item[1][2])
    while waiting or not engine.idle:
        while waiting and waiting[0][1][2] <= step:
            i, (prompt, p, _, priority) = waiting.pop(0)
            engine.add(engine.inputs.request(prompt, p, request_id=str(i), priority=priority))
        got.update({output.request_id: tokens_of(output) for output in engine.step()})
        step += 1
        assert step < 5000, "no progress"
    assert [got[str(i)] for i in range(len(work))] == want
    assert engine.core.stats().used_blocks == 0


@pytest.mark.parametrize("name", ["Qwen3", "Gemma4", "Gemma3n"])
def test_preempted_requests_end_as_if_alone(name: str, tmp_path: Path) -> None:
    build_hf(BY_NAME[name], tmp_path)
    folder = str(tmp_path)
    alone = make_engine(folder)
    prompts = [[3 + (i + j) % 9 for j in range(10)] for i in range(6)]
    want = [run_alone(alone, p, LONG) for p in prompts]
    for overlap in (False, True):
        engine = make_engine(
            folder, max_model_len=32, kv_cache_memory_bytes=14 * block_bytes(alone), async_scheduling=overlap
        )
        for i, prompt in enumerate(prompts):
            engine.add(engine.inputs.request(prompt, LONG, request_id=str(i)))
        outputs = {}
        while not engine.idle:
            outputs.update({o.request_id: o for o in engine.step()})
        assert [tokens_of(outputs[str(i)]) for i in range(len(prompts))] == want
        assert sum(o.metrics.num_preemptions for o in outputs.values()) > 0


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("hybrid")
    build_hf(BY_NAME["Lfm2"], path)
    return str(path)


@pytest.fixture(scope="module")
def hybrid_alone(hybrid: str) -> Engine:
    return make_engine(hybrid, enable_prefix_caching=False)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    requests,
    st.sampled_from([1, 3, 16, 2048]),
    st.integers(1, 6),
    st.sampled_from([56_000, 80_000, 2_000_000]),
    st.booleans(),
    st.booleans(),
)
def test_tokens_of_a_network_that_keeps_states_do_not_depend_on_company(
    hybrid: str,
    hybrid_alone: Engine,
    work: list,
    batched: int,
    seqs: int,
    memory: int,
    caching: bool,
    overlap: bool,
) -> None:
    want = [run_alone(hybrid_alone, prompt, p) for prompt, p, _, _ in work]
    engine = make_engine(
        hybrid,
        max_num_batched_tokens=batched,
        max_num_seqs=min(seqs, batched),
        kv_cache_memory_bytes=memory,
        max_model_len=32,
        enable_prefix_caching=caching,
        async_scheduling=overlap,
    )
    got: dict[str, list[list[int]]] = {}
    for i, (prompt, p, _, priority) in enumerate(work):
        engine.add(engine.inputs.request(prompt, p, request_id=str(i), priority=priority))
        got.update({output.request_id: tokens_of(output) for output in engine.step()})
    while not engine.idle:
        got.update({output.request_id: tokens_of(output) for output in engine.step()})
    assert [got[str(i)] for i in range(len(work))] == want
    assert engine.core.stats().used_blocks == 0


@pytest.mark.parametrize(
    ("caching", "words"), [(True, "kept, at ends of blocks of 4 tokens"), (False, ", 0 kept")]
)
def test_it_says_where_states_are_kept(hybrid: str, caching: bool, words: str) -> None:
    config = make_engine(hybrid, enable_prefix_caching=caching).config
    assert build_core(config, offline=True).summary.endswith(words)


def test_a_conversation_goes_on_from_the_state_of_its_last_turn(hybrid: str) -> None:
    engine, prompt = make_engine(hybrid), [3 + i % 9 for i in range(10)]
    engine.add(engine.inputs.request(prompt, LONG, request_id="first"))
    outputs = [output for _ in range(40) for output in engine.step()]
    (tokens,) = tokens_of(outputs[-1])
    engine.add(engine.inputs.request([*prompt, *tokens, 5], LONG, request_id="second"))
    again = [output for _ in range(40) for output in engine.step()]
    assert again[-1].num_cached_tokens == (len(prompt) + len(tokens) - 1) // BLOCK_SIZE * BLOCK_SIZE


def test_who_leaves_a_common_beginning_keeps_a_state_for_the_next(hybrid: str) -> None:
    engine, common = make_engine(hybrid), [3 + i % 7 for i in range(16)]
    cached = []
    for i in range(3):
        engine.add(engine.inputs.request([*common, 20 + i, 30, 40, 50, 60], LONG, request_id=str(i)))
        outputs = [output for _ in range(40) for output in engine.step()]
        cached.append(outputs[-1].num_cached_tokens)
    assert cached == [0, 0, 16]


@needs_cpu
def test_deterministic_is_what_a_cpu_does_anyway(folder: str, alone: Engine) -> None:
    prompt = [3, 4, 5]
    engine = make_engine(folder, deterministic=True, block_size=16)
    assert engine.config.deterministic and "anyway" in engine.reasons["deterministic"]
    assert run_alone(engine, prompt, LONG) == run_alone(alone, prompt, LONG)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"attention_backend": "reference"}, "attention_backend 'reference'.*deterministic"),
        ({"dtype": "float16"}, "no attention backend runs torch.float16.* reference: with deterministic"),
    ],
)
def test_what_cannot_be_deterministic_is_refused(folder: str, options: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        make_engine(folder, deterministic=True, **options)
