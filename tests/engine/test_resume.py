"""A request that was cut off anywhere, and is added again with the tokens it had, gets the tokens it would have got."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest

from quire.config import Config
from quire.engine.build import build_core
from quire.engine.core import EngineCore
from quire.engine.events import Submission, TokenEvent
from quire.errors import InvalidRequest
from quire.types import SamplingParams

PROMPT = (511, 263, 1029, 77, 902, 1500, 33, 410, 88, 1207, 640, 19, 351, 7)
LENGTH = 14
SEEDED = SamplingParams(temperature=2.0, seed=11, max_tokens=LENGTH, ignore_eos=True)
LATE = tuple(range(5, 4096, 4))  # a quarter of the vocabulary, of which the demo model draws one early
PARAMS = {
    "greedy": SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True),
    "seeded": SEEDED,
    "filters": replace(SEEDED, top_k=40, top_p=0.9, min_p=0.001),
    "penalties": replace(SEEDED, repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=1.0),
    "greedy with penalties": replace(SEEDED, temperature=0, frequency_penalty=2.0, repetition_penalty=1.3),
    "stop": replace(SEEDED, stop_token_ids=LATE),
    "late stop": replace(SEEDED, stop_token_ids=LATE, min_tokens=6),
    "bias": replace(SEEDED, logit_bias={77: 20.0, 902: 20.0, 323: -100.0}),
    "allowed": replace(SEEDED, allowed_token_ids=range(100, 140)),
    "logprobs": replace(SEEDED, logprobs=3),
    "prompt logprobs": replace(SEEDED, prompt_logprobs=2),
    "three": replace(SEEDED, n=3),
    "three with all": replace(
        SEEDED, n=3, stop_token_ids=LATE, min_tokens=4, frequency_penalty=1.0, top_p=0.95, logprobs=1
    ),
}
MACHINES = {
    "plain": {},
    "chunked": {"max_num_batched_tokens": 5, "max_num_seqs": 4},
    "no cache": {"enable_prefix_caching": False},
    "overlap": {"async_scheduling": True},
    "compiled kernels": {"block_size": 16},
}
Outputs = tuple[tuple[int, ...] | None, ...]


def make_core(**options: object) -> EngineCore:
    base = {"dtype": "float32", "device": "cpu", "block_size": 4, "max_model_len": 64}
    base |= {"kv_cache_memory_bytes": 16 * 2**20}
    return build_core(Config.of(model="demo", **base | options), offline=True).core


core_of = cache(lambda machine: make_core(**MACHINES[machine]))


def submission(params: SamplingParams, outputs: Outputs = (), name: str = "r") -> Submission:
    words = ((410, 88), (1207,), (33, 410, 640)) if params.n == 1 else ()
    return Submission(
        request_id=name,
        prompt_token_ids=PROMPT,
        params=params,
        max_tokens=LENGTH,
        bad_words=words,
        outputs=outputs,
    )


def run(core: EngineCore, *submissions: Submission) -> dict[int, list[TokenEvent]]:
    """Events by index; a step that brings nothing must not be the last."""
    for each in submissions:
        core.add(each)
    events: dict[int, list[TokenEvent]] = defaultdict(list)
    while not core.idle:
        for event in core.step():
            events[event.index].append(event)
    assert core.stats().used_blocks == 0 and not core.members and not core.owner
    return events


def tokens(events: Sequence[TokenEvent]) -> tuple[int, ...]:
    return tuple(e.token for e in events if e.token is not None)


@cache
def uninterrupted(name: str) -> dict[int, list[TokenEvent]]:
    return run(core_of("no cache"), submission(PARAMS[name]))


def cuts(whole: dict[int, list[TokenEvent]], n: int) -> list[Outputs]:
    """Where all sequences were cut: at several places, at different ones, and after one has ended."""
    lengths = [len(whole[i]) for i in range(n)]

    def at(*places: int) -> Outputs:
        ended = [place >= length for place, length in zip(places, lengths, strict=True)]
        return tuple(
            None if ended[i] else tokens(whole[i][:place]) for i, place in enumerate(places) if i < n
        )

    if n == 1:
        return [at(place) for place in range(lengths[0])]
    spread = [at(*(k + 2 * i for i in range(n))) for k in range(0, 12, 3)]
    return [*spread, at(*[1] * n), at(99, *[2] * (n - 1)), at(*[0] * (n - 1), 99)]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", PARAMS)
def test_what_comes_after_a_cut_is_what_would_have_come(name: str, machine: str) -> None:
    params, whole, core = PARAMS[name], uninterrupted(name), core_of(machine)
    for outputs in cuts(whole, params.n):
        if all(output is None for output in outputs):
            continue
        rest = run(core, submission(params, outputs))
        for index, output in enumerate(outputs):
            if output is None:
                assert index not in rest, "a sequence that has ended is not computed"
                continue
            want = whole[index][len(output) :]
            assert tokens(rest[index]) == tokens(want), (outputs, index)
            assert [(e.finish, e.stop_token) for e in rest[index]] == [(e.finish, e.stop_token) for e in want]
            if params.logprobs is not None:
                for ours, theirs in zip(rest[index], want, strict=True):
                    assert ours.logprobs.token_ids[0] == theirs.logprobs.token_ids[0]
                    assert ours.logprobs.logprobs == pytest.approx(theirs.logprobs.logprobs, abs=1e-4)
            assert all(e.num_cached_tokens <= len(PROMPT) for e in rest[index])


def test_the_cases_do_what_they_are_called() -> None:
    """Otherwise the test above could not fail."""
    of = {name: tokens(uninterrupted(name)[0]) for name in PARAMS}
    for name in ("filters", "penalties", "stop", "bias", "allowed"):
        assert of[name] != of["seeded"], name
    assert len(of["stop"]) < 6 <= len(of["late stop"]) < LENGTH
    assert of["greedy with penalties"] != of["greedy"]
    assert len({tokens(events) for events in uninterrupted("three").values()}) == 3
    ends = {len(events) for events in uninterrupted("three with all").values()}
    assert len(ends) > 1, "they end at different places"


@pytest.mark.parametrize("tail", [(410,), (33, 410), (410, 88)])
def test_bad_words_go_across_the_cut(tail: tuple[int, ...]) -> None:
    """What was generated before the cut is the beginning of a word that may not be completed after it."""
    params = replace(SEEDED, temperature=0, logit_bias={88: 100.0, 640: 90.0})
    forbidden = {(410,): 88, (33, 410): 88, (410, 88): None}[tail]
    first = tokens(run(core_of("plain"), submission(params, ((*tail,),)))[0])[0]
    free = replace(submission(params, ((*tail,),)), bad_words=())
    assert tokens(run(core_of("plain"), free)[0])[0] == 88
    assert first == 88 if forbidden is None else first not in (88, 640 if tail == (33, 410) else 88)


def test_the_prompt_is_scored_once() -> None:
    params = replace(SEEDED, n=2, prompt_logprobs=2)
    whole = run(core_of("plain"), submission(params))
    scores = [e.prompt_logprobs for events in whole.values() for e in events]
    assert len(whole[0][0].prompt_logprobs) == len(PROMPT) - 1
    assert [s is not None for s in scores] == [True] + [False] * (len(scores) - 1), (
        "with the first token only"
    )
    later = run(core_of("plain"), submission(params, (tokens(whole[0][:3]), ())))
    assert all(e.prompt_logprobs is None for events in later.values() for e in events)
    early = run(core_of("plain"), submission(params, ((), tokens(whole[1][:3]))))
    assert len(early[0][0].prompt_logprobs) == len(PROMPT) - 1, "its first token was not there yet"
    assert all(e.prompt_logprobs is None for e in early[1])


def test_nothing_is_added_when_all_have_ended() -> None:
    core = make_core()
    core.add(submission(replace(SEEDED, n=2), (None, None)))
    assert core.idle and not core.members
    core.add(submission(SEEDED))  # the id is free
    core.abort("r")


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (((1,), (2,)), "outputs for 2 sequences, and n is 1"),
        (((5,) * LENGTH,), f"{LENGTH} output tokens already"),
        (((1, 10**6),), "token id beyond"),
        (((-1,),), "token id beyond"),
    ],
)
def test_what_cannot_go_on_is_refused(outputs: Outputs, message: str) -> None:
    core = core_of("plain")
    with pytest.raises(InvalidRequest, match=message):
        core.add(submission(SEEDED, outputs))
    assert core.idle and not core.members and not core.owner and not core.runner.sampling


def test_an_id_in_use_is_refused() -> None:
    core = core_of("plain")
    core.add(submission(SEEDED))
    with pytest.raises(InvalidRequest, match="'r' is in use"):
        core.add(submission(SEEDED))
    assert tokens(run(core)[0]) == tokens(uninterrupted("seeded")[0])


def test_resumed_requests_run_beside_others_and_are_preempted() -> None:
    """In little memory sequences lose their blocks, so they start a second time with outputs of both kinds."""
    params = PARAMS["penalties"]
    whole = uninterrupted("penalties")[0]
    memory = {"max_model_len": 32, "kv_cache_memory_bytes": 16 * core_block_bytes()}
    core = make_core(enable_prefix_caching=False, **memory)
    for i in range(6):
        core.add(submission(params, (tokens(whole[: 2 * i]),), name=str(i)))
    got: dict[str, list[TokenEvent]] = defaultdict(list)
    while not core.idle:
        for event in core.step():
            got[event.request_id].append(event)
    for i in range(6):
        assert tokens(got[str(i)]) == tokens(whole[2 * i :])
    assert core.stats().num_preemptions > 0


def core_block_bytes() -> int:
    return 16 * 2**20 // core_of("plain").stats().num_blocks
