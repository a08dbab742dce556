"""Steps in fixed memory give what other steps give: the same tokens and log probabilities, whatever runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.attention.cpu import Cpu
from quire.config import Config
from quire.engine.engine import Engine
from quire.engine.events import Submission
from quire.layers.decoder import Decoder
from quire.runner.advance import ENDED
from quire.runner.fixed import FixedSteps, sizes_up_to, why_not
from quire.runner.graphs import Graphs
from quire.runner.mixed import (
    LEAST_TOKENS,
    MOST_TOKENS,
    MixedKind,
    MixedSteps,
    seq_sizes,
    token_sizes,
    worthwhile,
)
from quire.sampling.sampler import EXTRAS, FIXED_LOGPROBS
from quire.sampling.slots import Uses
from quire.types import OutputKind, SamplingParams
from tests.models.cases import BY_NAME, VOCAB_SIZE, build_hf
from tests.poison import poison

BLOCK_SIZE = 4
BAD_WORDS = ((4,), (5, 6), (3, 3, 3), *((token, token) for token in range(20, VOCAB_SIZE)))


def make_engine(folder: str, **options: object) -> Engine:
    """Whose steps are computed as they come."""
    base = {
        "dtype": "float32",
        "device": "cpu",
        "skip_tokenizer_init": True,
        "block_size": BLOCK_SIZE,
        "disable_log_stats": True,
        "max_model_len": 32,
        "max_logprobs": 200,
    }
    engine = Engine(Config.of(model=folder, **base | options), offline=True)
    engine.core.runner.fixed = engine.core.runner.mixed = None  # recordings; see test_recordings.py
    return engine


def forbid(engine: Engine) -> Engine:
    """Have every third prompt's length bring bad words, which else a tokenizer makes."""
    add = engine.core.add

    def add_with_words(submission: Submission) -> None:
        add(replace(submission, bad_words=BAD_WORDS if len(submission.prompt_token_ids) % 3 == 1 else ()))

    engine.core.add = add_with_words  # type: ignore[method-assign]
    return engine


def fix(engine: Engine) -> FixedSteps:
    """Have the engine's decode steps computed in fixed memory, as on a GPU but for the capture."""
    runner = engine.core.runner
    parts = (runner.model, runner.caches, runner.state, runner.sampler)
    graphs = Graphs(capture=False, keeps_states=runner.states is not None)
    runner.fixed = FixedSteps(*parts, block_size=runner.state.block_size, graphs=graphs)
    return runner.fixed


def mix(engine: Engine, most_tokens: int = 40) -> MixedSteps:
    """The same, and all steps of so many positions too."""
    engine.core.runner.mixed = MixedSteps(fix(engine), most_tokens)
    return engine.core.runner.mixed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("qwen3")
    build_hf(BY_NAME["Qwen3"], path)
    return str(path)


@pytest.fixture(scope="module")
def block_bytes(folder: str) -> int:
    engine = make_engine(folder)
    return engine.config.kv_cache_memory_bytes // engine.core.stats().num_blocks


def run(engine: Engine, work: list, aborted: tuple[str, int] = ("", -1)) -> dict[str, list]:
    """Each request's sequences, as (tokens, log probabilities, finish reason), when requests come over time.

    `aborted`: a request, and the step before which it is.
    """
    got: dict[str, list] = {}
    step, waiting = 0, sorted(enumerate(work), key=lambda item: item[1][2])
    while waiting or not engine.idle:
        while waiting and waiting[0][1][2] <= step:
            i, (prompt, params, _) = waiting.pop(0)
            engine.add(engine.inputs.request(prompt, params, request_id=str(i)))
        if step == aborted[1]:
            engine.abort(aborted[0])
        for output in engine.step():
            got[output.request_id] = [(o.token_ids, o.logprobs, o.finish_reason) for o in output.outputs]
            got[output.request_id].append(output.prompt_logprobs)
        step += 1
        assert step < 5000, "no progress"
    assert engine.core.stats().used_blocks == 0
    return got


every = {
    "repetition_penalty": st.sampled_from([1.0, 1.0, 1.0, 1.3]),
    "frequency_penalty": st.sampled_from([0.0, 0.0, 0.0, 0.9]),
    "allowed_token_ids": st.sampled_from([None, None, None, [3, 4, 5, 6, 90]]),
    "min_tokens": st.sampled_from([0, 0, 1]),
    "logprobs": st.sampled_from([None, None, 0, 3, 20, 25, -1]),
    "prompt_logprobs": st.sampled_from([None, None, None, 2]),
    "logit_bias": st.sampled_from([None, None, None, {5: 2.0}]),
    "max_tokens": st.integers(1, 12),
    "stop_token_ids": st.lists(st.integers(3, VOCAB_SIZE - 1), max_size=8),
    "output_kind": st.just(OutputKind.FINAL_ONLY),
}
greedy = st.builds(SamplingParams, temperature=st.just(0.0), **every)
random = st.builds(
    SamplingParams,
    n=st.integers(1, 3),
    temperature=st.sampled_from([0.7, 1.5]),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([0, 5]),
    min_p=st.sampled_from([0.0, 0.05]),
    seed=st.integers(0, 1000),
    **every,
)
prompts = st.lists(st.integers(3, 6), min_size=1, max_size=16)
requests = st.lists(st.tuples(prompts, greedy | random, st.integers(0, 15)), min_size=1, max_size=6)


cases = st.tuples(
    requests, st.sampled_from([4, 16, 2048]), st.integers(1, 6), st.integers(9, 30), st.booleans()
)


def check(
    folder: str, block_bytes: int, work: list, batched: int, seqs: int, blocks: int, overlap: bool
) -> None:
    options = {
        "max_num_batched_tokens": batched,
        "max_num_seqs": min(seqs, batched),
        "kv_cache_memory_bytes": blocks * block_bytes,
        "async_scheduling": overlap,
    }
    want = run(forbid(make_engine(folder, **options)), work)
    for prepare in (fix, lambda engine: mix(engine).fixed):
        engine = forbid(make_engine(folder, **options))
        fixed = prepare(engine)
        assert run(engine, work) == want
        assert not fixed.graphs.has_failed  # or all of it would have been computed otherwise


@settings(max_examples=6, deadline=None, derandomize=True)
@given(cases)
def test_fixed_steps_equal_others(folder: str, block_bytes: int, case: tuple[Any, ...]) -> None:
    check(folder, block_bytes, *case)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(cases)
def test_fixed_steps_equal_others_at_length(folder: str, block_bytes: int, case: tuple[Any, ...]) -> None:
    check(folder, block_bytes, *case)


@pytest.mark.parametrize("overlap", [False, True])
def test_every_kind_of_step_is_taken_and_preemption_changes_nothing(
    folder: str, block_bytes: int, overlap: bool
) -> None:
    shared = {"max_tokens": 14, "ignore_eos": True, "output_kind": OutputKind.FINAL_ONLY}
    kinds = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 5, "top_p": 0.9},
        {"temperature": 1.0, "seed": 6, "logprobs": 2},
        {"temperature": 0.0, "presence_penalty": 0.5},
        {"temperature": 0.0, "logit_bias": {7: 2.0}, "logprobs": 0},
        {"temperature": 0.0, "logprobs": FIXED_LOGPROBS + 1},
    ]
    work = [
        ([3 + (i + j) % 9 for j in range(8)], SamplingParams(**shared, **kind), 24 * i)
        for i, kind in enumerate(kinds)
    ]
    work += [(prompt, params, 24 * len(kinds) + 14) for prompt, params, _ in work]
    options = {"kv_cache_memory_bytes": 16 * block_bytes, "async_scheduling": overlap}
    engine = make_engine(folder, **options)
    fixed = fix(engine)
    got = run(engine, work)
    assert got == run(make_engine(folder, **options), work)
    alone, together = ([got[str(i)][0][0] for i in part] for part in (range(6), range(6, 12)))
    assert alone == together
    assert engine.core.stats().num_preemptions > 0
    random = Uses.RANDOM | Uses.FILTERS
    kinds_alone = {kind.uses for kind in fixed.graphs.ready if kind.num_rows == 1}
    assert kinds_alone == {Uses(0), random, random | Uses.LOGPROBS, EXTRAS, EXTRAS | Uses.LOGPROBS, None}


def test_prompts_join_newest_tokens_in_mixed_steps(folder: str) -> None:
    """In chunks, beside each other, and with whatever is sampled; larger steps and scored prompts go elsewhere."""
    shared = {"max_tokens": 20, "ignore_eos": True, "output_kind": OutputKind.FINAL_ONLY}
    kinds = [{"temperature": 0.0}, {"seed": 5, "top_p": 0.9}, {"seed": 6, "logprobs": 2}]
    work = [
        ([3 + (i * j) % 90 for j in range(6 + 4 * i)], SamplingParams(**shared, **kinds[i % 3]), i)
        for i in range(5)
    ]
    work.append(([7] * 9, SamplingParams(**shared, temperature=0.0, prompt_logprobs=1), 12))
    options = {"max_num_seqs": 6, "max_num_batched_tokens": 12, "enable_prefix_caching": False}
    engine, plain = make_engine(folder, **options), make_engine(folder, **options)
    mixed = mix(engine)
    assert run(engine, work) == run(plain, work)
    kinds_seen = {kind for kind in mixed.fixed.graphs.ready if isinstance(kind, MixedKind)}
    assert {kind.mixed for kind in kinds_seen} == {True, False}
    assert {kind.num_seqs for kind in kinds_seen} == {1, 6}
    assert {kind.num_tokens for kind in kinds_seen} == {32}
    assert {Uses(0), Uses.RANDOM | Uses.FILTERS | Uses.LOGPROBS} <= {kind.uses for kind in kinds_seen}
    assert not mixed.fixed.graphs.has_failed
    narrow = make_engine(folder, **options)
    mixed = mix(narrow, 11)
    assert run(narrow, work) == run(plain, work)
    assert {kind.num_tokens for kind in mixed.fixed.graphs.ready if isinstance(kind, MixedKind)} == {11}


def test_a_step_that_cannot_be_fixed_is_computed_otherwise(
    folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=12, ignore_eos=True, logprobs=1)
    work = [([3, 4, 5 + i], params, 2 * i) for i in range(3)]
    want = run(make_engine(folder), work)
    for error in (torch.OutOfMemoryError("no memory"), ValueError("no such kernel")):
        engine = make_engine(folder)
        fixed = fix(engine)
        fixed.model = Failing(fixed.model, error)  # type: ignore[assignment]
        caplog.clear()
        with caplog.at_level("WARNING", "quire"):
            assert run(engine, work) == want
        warnings = [r for r in caplog.records if "CUDA graph" in r.message]
        assert [r.exc_info and r.exc_info[1] for r in warnings] == [error]
        assert fixed.graphs.num_refused > 0 and fixed.ring.num_steps == 0


def test_compiled_attention_takes_padding(folder: str) -> None:
    shared = {"max_tokens": 12, "ignore_eos": True, "output_kind": OutputKind.FINAL_ONLY, "logprobs": 2}
    work = [([3 + i] * (2 + 4 * i), SamplingParams(seed=i, **shared), 2 * i) for i in range(5)]
    options = {"block_size": 16, "max_num_seqs": 6}
    engine = make_engine(folder, **options)
    fixed = fix(engine)
    assert run(engine, work) == run(make_engine(folder, **options), work)
    name = engine.core.runner.model.backend.name
    assert name == "cpu" or Cpu(16).why_not(torch.float32, torch.device("cpu"))
    assert {kind.num_rows for kind in fixed.graphs.ready} >= {4, 6}


@pytest.mark.parametrize("overlap", [False, True])
def test_bad_rows_and_aborts_leave_the_others_alone(folder: str, overlap: bool) -> None:
    shared = {"max_tokens": 10, "ignore_eos": True, "output_kind": OutputKind.FINAL_ONLY}
    greedy, random = SamplingParams(temperature=0, **shared), SamplingParams(seed=4, **shared)
    work = [([3, 4 + i, 5], random if i % 2 else greedy, i) for i in range(5)]
    work += [([5, 6, 7 + i], random, 10 + i) for i in range(3)]  # in slots and blocks that others had
    options = {"max_num_seqs": 5, "async_scheduling": overlap, "enable_prefix_caching": False}
    victim = run(make_engine(folder, **options), work)["1"][0][0][5]
    got = []
    for prepare in (fix, lambda engine: None):
        engine = make_engine(folder, **options)
        poison(engine.core.runner.model, victim)
        fixed = prepare(engine)
        got.append(run(engine, work, aborted=("2", 7)))
        assert fixed is None or (fixed.ring.num_steps and not fixed.graphs.has_failed)
    assert got[0] == got[1]
    reasons = [output[0][2] for output in got[0].values()]
    assert got[0]["1"][0][2] == "error" and len(got[0]["1"][0][0]) <= 6 and "length" in reasons


@pytest.mark.parametrize("overlap", [False, True])
def test_a_stop_token_ends_its_row_before_the_host_knows(folder: str, overlap: bool) -> None:
    """The step that is under way meanwhile computes nothing for it, and the slot's next sequence goes on as ever."""
    shared = {"temperature": 0.0, "max_tokens": 16, "output_kind": OutputKind.FINAL_ONLY}
    options = {"max_num_seqs": 3, "async_scheduling": overlap, "enable_prefix_caching": False}
    prompts = [[3 + i, 9, 30 + 7 * i] for i in range(6)]
    free = SamplingParams(**shared, ignore_eos=True)
    want = run(make_engine(folder, **options), [(prompt, free, i) for i, prompt in enumerate(prompts)])
    work = []
    for i, prompt in enumerate(prompts):
        stop = want[str(i)][0][0][4 + i]
        params = SamplingParams(**shared, ignore_eos=True, stop_token_ids=[stop, 103], min_tokens=i % 2)
        work.append((prompt, params, i))
    engine = make_engine(folder, **options)
    fixed = mix(engine).fixed
    start, reports = fixed.start, []

    def reported(*args: Any) -> Any:
        reports.append(start(*args))
        return reports[-1]

    fixed.start = reported  # type: ignore[method-assign]
    got = run(engine, work)
    assert got == run(make_engine(folder, **options), work)
    reasons = [got[str(i)][0][2] for i in range(6)]
    assert reasons.count("stop") > 3
    num_ended = sum(fetch().token_ids.count(ENDED) for fetch in reports)
    assert num_ended == (reasons.count("stop") if overlap else 0)


def test_a_sequence_that_only_the_device_has_ended_fails_and_no_other(folder: str) -> None:
    shared = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, "output_kind": OutputKind.FINAL_ONLY}
    work = [([3, 4, 5 + i], SamplingParams(**shared), 0) for i in range(3)]
    want = run(make_engine(folder), work)
    engine = make_engine(folder)
    fix(engine)
    for i, (prompt, params, _) in enumerate(work):
        engine.add(engine.inputs.request(prompt, params, request_id=str(i)))
    for _ in range(4):
        engine.step()
    slot = engine.core.scheduler.seqs[1].slot
    engine.core.runner.state.numbers[slot, 0].neg_()
    got = run(engine, [])
    assert got["1"][0][2] == "error" and 0 < len(got["1"][0][0]) < 12
    assert [got[key] for key in ("0", "2")] == [want[key] for key in ("0", "2")]


class Failing:
    """A network without a head."""

    def __init__(self, network: Decoder, error: Exception):
        self.network, self.error = network, error

    def __call__(self, *args: Any) -> Tensor:
        return self.network(*args)

    def logits(self, hidden: Tensor) -> Tensor:
        raise self.error


def test_sizes_cover_every_number_of_rows() -> None:
    assert sizes_up_to(1) == [1] and sizes_up_to(3) == [1, 2, 3] and sizes_up_to(8) == [1, 2, 4, 8]
    for most in (5, 24, 100, 256, 1000):
        sizes = sizes_up_to(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most


def test_sizes_of_mixed_steps(folder: str) -> None:
    for most in (1, 32, 100, 512, 700, 2048):
        sizes = token_sizes(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most
        assert seq_sizes(most)[-1] == most
    small = make_engine(folder).core.runner.model.spec
    assert worthwhile(small) == MOST_TOKENS
    wide = replace(small.blocks[0], mlp=replace(small.blocks[0].mlp, hidden=10**7))
    large = replace(small, blocks=(wide,))  # computing takes longer than launching
    assert worthwhile(large) == LEAST_TOKENS


def test_a_cpu_has_no_graphs(folder: str) -> None:
    runner = make_engine(folder).core.runner
    assert runner.fixed is None and why_not(runner.model, torch.device("cpu")) is not None
