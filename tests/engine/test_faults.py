"""What goes wrong for one request, or for a moment, inside a step: the others get their tokens."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.config import Config
from quire.engine.build import build_core
from quire.engine.core import EngineCore
from quire.engine.events import Submission, TokenEvent
from quire.sampling.rules import read
from quire.types import SamplingParams
from tests.models.cases import BY_NAME, build_hf
from tests.poison import poison

POISON = 3333  # a token that no good request has
PARAMS = SamplingParams(
    temperature=0.8, seed=4, max_tokens=12, ignore_eos=True, presence_penalty=0.5, logprobs=1
)
GOOD = [(511, 263, 100 + i, *range(200, 210 + 3 * i)) for i in range(4)]


def make_core(**options: Any) -> EngineCore:
    base = {"model": "demo", "device": "cpu", "dtype": "float32", "max_model_len": 64, "max_num_seqs": 6}
    return build_core(Config.of(**base | options), offline=True).core


def submission(name: str, prompt: tuple[int, ...], params: SamplingParams = PARAMS) -> Submission:
    return Submission(request_id=name, prompt_token_ids=prompt, params=params, max_tokens=12)


def good() -> list[Submission]:
    return [submission(f"good {i}", prompt) for i, prompt in enumerate(GOOD)]


def run(core: EngineCore, asked: list[Submission]) -> dict[str, list[TokenEvent]]:
    for each in asked:
        core.add(each)
    events: dict[str, list[TokenEvent]] = defaultdict(list)
    while not core.idle:
        for event in core.step():
            events[event.request_id].append(event)
    assert core.stats().used_blocks == 0 and not core.owner
    return events


def tokens(events: dict[str, list[TokenEvent]]) -> dict[str, list[int | None]]:
    return {name: [e.token for e in line] for name, line in sorted(events.items())}


def failed(events: list[TokenEvent]) -> bool:
    return [(e.token, e.finish) for e in events][-1:] == [(None, "error")] and bool(events[-1].error)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("cpu", "bfloat16"), ("cpu", "float32"), ("reference", "float32")]
)
def test_nan_in_one_row_fails_that_row_and_leaves_nothing_behind(
    backend: str, dtype: str, caching: bool, overlap: bool
) -> None:
    """Its blocks hold NaN, and others get them next; 0 times NaN is NaN."""
    core = make_core(
        attention_backend=backend, dtype=dtype, enable_prefix_caching=caching, async_scheduling=overlap
    )
    want = tokens(run(core, good()))
    assert all(POISON not in line for line in want.values())
    poison(core.runner.model, POISON)
    for _ in range(4):
        bad = [submission(f"bad {i}", (POISON,) * (17 + 20 * i)) for i in range(2)]
        got = run(core, [*bad, *good()])
        assert failed(got.pop("bad 0")) and failed(got.pop("bad 1"))
        assert tokens(got) == want


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_bad", [1, 2, 3])
def test_what_cannot_be_sampled_fails_alone(num_bad: int, overlap: bool) -> None:
    core = make_core(async_scheduling=overlap)
    want = tokens(run(core, good()))
    biased = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logit_bias={5: 1.0})
    bad = [submission(f"bad {i}", (900 + i, 7, 7), biased) for i in range(num_bad)]
    events: dict[str, list[TokenEvent]] = defaultdict(list)
    for each in [*good()[:2], *bad, *good()[2:]]:
        core.add(each)
    while not core.idle:
        for event in core.step():
            events[event.request_id].append(event)
        with torch.inference_mode():  # which records were made in
            for record in core.runner.sampler._params.kept.rules.of:
                if record is not None:
                    read(record)[1].added.fill_(10**9)  # no such token: the rule cannot be applied
    for each in bad:
        line = events.pop(each.request_id)
        assert failed(line) and "sampling failed" in (line[-1].error or "") and len(line) < 12
    assert tokens(events) == want


def test_a_sampler_that_fails_for_everybody_is_the_engines_end() -> None:
    core = make_core()
    for each in good():
        core.add(each)

    def fail(*args: Any) -> Any:
        raise RuntimeError("it fails")

    core.runner.sampler._choose = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no sequence of the step could be sampled"):
        while not core.idle:
            core.step()


class Tight:
    """A network in little memory: for `room(step)` positions at once, and logits of as many or of `most_logits`."""

    def __init__(self, network: Any, room: Any, most_logits: int | None = None):
        self.network, self.room, self.most_logits = network, room, most_logits
        self.num_steps = self.num_shortages = 0
        self.axes, self.vocabulary, self.build = network.axes, network.vocabulary, network.build

    def __call__(self, token_ids: Tensor, *rest: Any) -> Tensor:
        self.num_steps += 1
        self._check(token_ids, self.room(self.num_steps))
        return self.network(token_ids, *rest)

    def logits(self, hidden: Tensor) -> Tensor:
        self._check(hidden, self.most_logits or self.room(self.num_steps))
        return self.network.logits(hidden)

    def _check(self, rows: Tensor, most: int) -> None:
        if len(rows) > most:
            self.num_shortages += 1
            raise torch.OutOfMemoryError(f"{len(rows)} rows")


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("room", [1, 2, 3, 7, 30])
def test_running_out_of_memory_makes_steps_smaller(room: int, overlap: bool) -> None:
    params = SamplingParams(
        temperature=0.8, seed=4, max_tokens=12, ignore_eos=True, n=2, prompt_logprobs=None
    )
    asked = [*good(), submission("pair", GOOD[1], params)]
    core = make_core(async_scheduling=overlap)
    want = tokens(run(core, asked))
    core = make_core(async_scheduling=overlap)
    core.runner.model = tight = Tight(core.runner.model, lambda step: room)
    assert tokens(run(core, asked)) == want
    assert tight.num_shortages > 0 and core.stats().num_preemptions == 0


def test_a_shortage_of_a_moment_is_forgotten() -> None:
    core = make_core()
    want = tokens(run(core, good()))
    core.runner.fixed = None  # whose memory is there already
    core.runner.model = tight = Tight(core.runner.model, lambda step: 3 if step == 3 else 10**6)
    assert tokens(run(core, good())) == want
    assert tight.num_shortages == 1


def test_no_memory_for_a_single_position_is_the_engines_end() -> None:
    core = make_core()
    core.add(good()[0])
    core.runner.model = Tight(core.runner.model, lambda step: 0)
    with pytest.raises(torch.OutOfMemoryError):
        core.step()


def test_a_prompt_that_cannot_be_scored_fails_alone() -> None:
    scored = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=1)
    core = make_core()
    want = tokens(run(core, good()))
    core.runner.model = Tight(core.runner.model, lambda step: 10**6, most_logits=30)
    for each in [*good(), submission("scored", tuple(range(40)), scored)]:
        core.add(each)
    events: dict[str, list[TokenEvent]] = defaultdict(list)
    while not core.idle:
        for event in core.step():
            events[event.request_id].append(event)
    line = events.pop("scored")
    assert failed(line) and "prompt could not be scored" in (line[-1].error or "")
    assert tokens(events) == want


class Halfway(Tight):
    """It runs out of memory when its layers have gone on already."""

    def __call__(self, token_ids: Tensor, *rest: Any) -> Tensor:
        self.num_steps += 1
        hidden = self.network(token_ids, *rest)
        self._check(token_ids, self.room(self.num_steps))
        return hidden


def told(events: dict[str, list[TokenEvent]]) -> dict[str, list[tuple[object, ...]]]:
    return {name: [(e.token, e.logprobs, e.prompt_logprobs) for e in line] for name, line in events.items()}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("step", [1, 2, 4])
def test_who_loses_a_state_begins_again(step: int, overlap: bool, tmp_path: Path) -> None:
    build_hf(BY_NAME["Lfm2"], tmp_path)
    params = replace(PARAMS, prompt_logprobs=1)
    asked = [submission(f"{i}", tuple(range(5 + i, 25 + 3 * i)), params) for i in range(4)]
    options = {"model": str(tmp_path), "async_scheduling": overlap, "max_num_batched_tokens": 40}
    want = told(run(make_core(**options), asked))
    core = make_core(**options)
    core.runner.fixed = None  # see tests/runner/test_fixed_states.py
    core.runner.model = tight = Halfway(core.runner.model, lambda now: 3 if now == step else 10**6)
    assert told(run(core, asked)) == want
    assert tight.num_shortages == 1 and core.stats().num_preemptions > 0
