"""The engine dies, hangs or is poisoned under streams: nobody is lost, and nobody gets another token than otherwise."""

import json
import re
from pathlib import Path

import pytest

from tests.faults import scenarios
from tests.faults.client import Answer, streams
from tests.faults.injection import Fault
from tests.faults.running import run

pytestmark = pytest.mark.slow
RANKS = ("--tensor-parallel-size", "2")


def test_kills_lose_nothing(tmp_path: Path) -> None:
    report = run(scenarios.killed(tmp_path, bodies=streams(64), num_kills=10))
    assert report.is_clean
    assert max(report.recoveries_s) < 20


def test_kills_while_models_think_leave_budgets_as_they_were(tmp_path: Path) -> None:
    thinks = {"prompt": "What is 17 + 25? <think>\n", "thinking_token_budget": 60, "logit_bias": {4091: -100}}
    bodies = [{**body, **thinks} for body in streams(16)]
    assert run(scenarios.killed(tmp_path, bodies=bodies, num_kills=4)).is_clean


def test_kills_leave_texts_in_their_form(tmp_path: Path) -> None:
    """Of a schema, greedily; of a regular expression, two at once; and such that end with a stop string."""
    item = {"type": "integer", "minimum": -999, "maximum": 999}
    named = {
        "name": {"type": "string", "minLength": 20, "maxLength": 60},
        "items": {"type": "array", "minItems": 12, "maxItems": 12, "items": item},
    }
    schema = {"type": "object", "properties": named, "required": [*named], "additionalProperties": False}
    every = {"max_tokens": 400, "stream": True, "return_token_ids": True}
    forms = [
        {"structured_outputs": {"json": schema}, "temperature": 0},
        {"structured_outputs": {"regex": "([a-z]{3,9} ){8}end"}, "n": 2, "temperature": 1},
        {"structured_outputs": {"regex": "a[0-8]{20,40}9[a-z]{30}"}, "stop": ["9"], "temperature": 1},
    ]

    def is_right(answer: Answer) -> bool:
        one, *more = answer.texts.values()
        if more:
            return all(re.fullmatch("([a-z]{3,9} ){8}end", text) for text in (one, *more))
        return re.fullmatch("a[0-8]{20,40}", one) is not None or sorted(json.loads(one)) == ["items", "name"]

    bodies = [{**every, "prompt": f"Number {i}", "seed": i, **forms[i % 3]} for i in range(24)]
    report = run(scenarios.killed(tmp_path, bodies=bodies, num_kills=6, is_right=is_right))
    assert report.is_clean


def test_a_stopped_engine_is_noticed_and_replaced(tmp_path: Path) -> None:
    report = run(scenarios.stopped(tmp_path, num_streams=32))
    assert report.is_clean and report.num_restarts == 1


def test_what_cannot_be_sampled_fails_alone(tmp_path: Path) -> None:
    assert run(scenarios.cannot_be_sampled(tmp_path, num_streams=16)).is_clean


def test_what_is_not_a_number_fails_alone(tmp_path: Path) -> None:
    assert run(scenarios.not_a_number(tmp_path, num_streams=16)).is_clean


@pytest.mark.parametrize(
    ("fault", "at", "stream", "hang_s"),
    [
        (Fault.EXITS, 0, False, 10.0),
        (Fault.EXITS, 7, True, 10.0),
        (Fault.HANGS, 2, True, 1.0),
    ],
)
def test_a_poison_fails_alone(tmp_path: Path, fault: Fault, at: int, stream: bool, hang_s: float) -> None:
    report = run(scenarios.poison(tmp_path, fault, at, num_streams=16, stream=stream, hang_s=hang_s))
    assert report.is_clean


def test_engines_that_always_die_are_given_up(tmp_path: Path) -> None:
    assert run(scenarios.always_dies(tmp_path, num_streams=16)).num_lost == 0


def test_kills_of_an_engine_of_ranks_lose_nothing(tmp_path: Path) -> None:
    report = run(scenarios.killed(tmp_path, *RANKS, bodies=streams(32), num_kills=4))
    assert report.is_clean


def test_a_stopped_engine_of_ranks_is_noticed_and_replaced(tmp_path: Path) -> None:
    report = run(scenarios.stopped(tmp_path, *RANKS, num_streams=16))
    assert report.is_clean and report.num_restarts == 1


def test_what_is_not_a_number_on_ranks_fails_alone(tmp_path: Path) -> None:
    assert run(scenarios.not_a_number(tmp_path, *RANKS, num_streams=16)).is_clean


@pytest.mark.parametrize(
    ("fault", "at", "hang_s"), [(Fault.EXITS, 7, 10.0), (Fault.HANGS, 2, 1.0), (Fault.RAISES, 0, 10.0)]
)
def test_a_poison_of_ranks_fails_alone(tmp_path: Path, fault: Fault, at: int, hang_s: float) -> None:
    """What a sampler raises is one, too: the others may not have met it."""
    report = run(scenarios.poison(tmp_path, fault, at, *RANKS, num_streams=16, stream=True, hang_s=hang_s))
    assert report.is_clean


def test_engines_of_ranks_that_always_die_are_given_up(tmp_path: Path) -> None:
    assert run(scenarios.always_dies(tmp_path, *RANKS, num_streams=16)).num_lost == 0
