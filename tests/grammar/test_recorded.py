"""Steps whose rows have masks are replayed whole, in two halves, and sample what they would otherwise."""

from typing import Any

import pytest

from quire.config import Config
from quire.engine.engine import Engine
from quire.kernels.cpu import native
from quire.runner.fixed import DrawKind, FixedSteps
from quire.runner.recordings import Recordings
from quire.runner.runner import Runner
from quire.sampling.slots import Uses
from quire.types import SamplingParams, StructuredOutputsParams
from tests.grammar.test_structured import AS_JSON
from tests.runner.test_fixed import run

pytestmark = pytest.mark.skipif(native.load()[0] is None, reason="the C++ kernels are not built")
WORDS = StructuredOutputsParams(regex="([a-z]{1,3} [0-9]{1,2}, ){1,9}")
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"structured_outputs": AS_JSON, "n": 2},
    {"structured_outputs": WORDS, "temperature": 0.0},
    {"top_p": 0.8, "top_k": 20},
    {"structured_outputs": WORDS, "top_p": 0.9, "min_p": 0.01, "temperature": 1.3},
    {"thinking_token_budget": 2, "temperature": 1.5, "n": 2},
    {"structured_outputs": AS_JSON, "thinking_token_budget": 3},
    {"structured_outputs": StructuredOutputsParams(choice=["yes", "no"]), "stop_token_ids": [5, 6]},
)
OTHERS: tuple[dict[str, Any], ...] = (
    {"structured_outputs": AS_JSON, "presence_penalty": 0.5, "logit_bias": {7: 2.0}, "min_tokens": 3},
    {"structured_outputs": WORDS, "logprobs": 2},
)


CLOSE = 4091  # </think>


def workload(kinds: tuple[dict[str, Any], ...], count: int = 16) -> list:
    """Requests that come and go; those with budgets begin in thoughts."""
    work = []
    for i in range(count):
        kind = kinds[i % len(kinds)]
        prompt = "Hm. <think>\n" if "thinking_token_budget" in kind else f"Number {i}:"
        work.append((prompt, SamplingParams(seed=i, max_tokens=12 + 5 * (i % 4), **kind), 3 * i))
    return work


def make_engine(**options: object) -> Engine:
    base = {"model": "demo", "device": "cpu", "max_model_len": 128, "max_num_seqs": 7}
    base |= {"disable_log_stats": True, "kv_cache_memory_bytes": 16 << 20}
    return Engine(Config.of(**base | options), offline=True)


def fixed_of(runner: Runner) -> FixedSteps:
    assert runner.fixed is not None
    return runner.fixed


def draws(runner: Runner) -> set[DrawKind]:
    """Kinds of second halves that were recorded; those of any number of rows have none."""
    graphs = fixed_of(runner).graphs
    assert isinstance(graphs, Recordings)
    sized = {kind for (kind, *_), step in graphs.rehearsed.items() if step is not None}
    return {kind for kind in sized | {kind for (kind, _) in graphs.steps} if isinstance(kind, DrawKind)}


@pytest.mark.parametrize("overlap", [False, True])
def test_masked_steps_answer_as_others(overlap: bool) -> None:
    one, other = (make_engine(async_scheduling=overlap) for _ in range(2))
    other.core.runner.fixed = other.core.runner.mixed = None
    work = workload(KINDS)
    got = run(one, work)
    assert got == run(other, work)
    assert all(CLOSE in tokens[:4] for tokens, _, _ in got["5"][:2])
    found = draws(one.core.runner)
    assert {kind.uses & ~(Uses.RANDOM | Uses.FILTERS) for kind in found} >= {Uses.MASKS}
    assert {kind.num_rows for kind in found} == {0, 1} and not fixed_of(one.core.runner).graphs.refused
    work = workload(OTHERS, 3)
    assert run(one, work) == run(other, work)
    assert fixed_of(one.core.runner).graphs.refused


@pytest.mark.parametrize("keeps_states", [False, True])
def test_what_fails_after_the_network_is_sampled_otherwise(keeps_states: bool) -> None:
    """Where layers keep states, too: these are what they were when the network was done."""
    one, other = make_engine(), make_engine()
    other.core.runner.fixed = other.core.runner.mixed = None
    fixed = fixed_of(one.core.runner)
    graphs, sampler = fixed.graphs, fixed.sampler.sample_fixed
    assert isinstance(graphs, Recordings)
    graphs.keeps_states = keeps_states

    def fail_with_masks(*args: Any) -> Any:
        if args[-1] & Uses.MASKS:
            raise RuntimeError("no memory")
        return sampler(*args)

    fixed.sampler.sample_fixed = fail_with_masks  # type: ignore[method-assign]
    work = workload(KINDS, 5)
    assert run(one, work) == run(other, work)
    assert {*graphs.refused.values()} == {"RuntimeError"}
    assert not any(kind.uses & Uses.MASKS for kind in draws(one.core.runner))


@pytest.mark.slow
def test_ranks_record_their_draws() -> None:
    one, other = (make_engine(tensor_parallel_size=2) for _ in range(2))
    try:
        other.core.runner.runner.fixed = other.core.runner.runner.mixed = None
        work = workload(KINDS)
        assert run(one, work) == run(other, work)
        assert any(kind.num_rows == 0 and kind.uses & Uses.MASKS for kind in draws(one.core.runner.runner))
    finally:
        one.close()
        other.close()
