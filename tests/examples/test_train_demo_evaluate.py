"""How answers of the demo model are judged, by hand; and how many steps of drafting a text takes."""

import json
from typing import Any

import pytest
import torch

from benchmarks.draft_acceptance import num_steps
from examples.train_demo.data import document, template
from examples.train_demo.evaluate import is_story, score
from examples.train_demo.skills import SKILLS, Example, Writer

STORY = "A fox woke up. It was red. It had a plan. Ida came by. They went home. All was well."
CALLS = [{"name": "weather", "arguments": {"city": city, "days": 1}} for city in ("Rome", "Oslo")]


def make(
    answer: str, skill: str = "facts", style: str = "", thinking: bool = True, user: str = "?", **more: Any
) -> Example:
    example = Example(skill, thinking, style=style, final=skill)
    example.say("user", user)
    example.say("assistant", answer, **more)
    return example


def calling() -> Example:
    return make("", "tools", tool_calls=[{"type": "function", "function": call} for call in CALLS])


def written(*calls: object) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)


@pytest.mark.parametrize("skill", SKILLS)
def test_what_the_generator_wrote_is_right(skill: str) -> None:
    writer, form = Writer("score", test=True), template()
    for _ in range(150):
        example = writer.example(skill)
        text = document(example, form)[-1][0].removesuffix("<|im_end|>")
        assert score(example, text) == (True, True), text
        assert score(example, text, ended=False)[1] is False
        judged_whole = example.final not in ("stories", "unknown") and "<tool_call>" not in text
        assert not judged_whole or not score(example, text + "!")[0]


def test_an_answer_is_right_if_it_is_the_same() -> None:
    assert score(make("Paris."), "Paris.") == (True, True)
    assert score(make("Paris."), "Rome.") == (False, True)
    assert score(make("Paris."), "Paris.", ended=False) == (True, False)


def test_it_thinks_once_if_it_may() -> None:
    thought = "<think>\n1 + 1\n</think>\n\n"
    assert score(make("2"), thought + "2") == (True, True)
    assert score(make("2"), "2") == (True, True)
    assert score(make("2", thinking=False), thought + "2") == (False, False)
    for text in (thought + thought + "2", "2" + thought, "<think>\n1 + 1", thought.strip() + "2"):
        assert score(make("2"), text) == (False, False), text


@pytest.mark.parametrize(
    ("style", "obeys", "breaks"),
    [
        ("capitals", "PARIS.", "Paris."),
        ("lower case", "paris.", "Paris."),
        ("list", "- red\n- blue", "- red\nblue"),
        ("one word", "Paris", "It is Paris."),
    ],
)
def test_a_style_is_obeyed(style: str, obeys: str, breaks: str) -> None:
    assert score(make(obeys, style=style), obeys) == (True, True)
    assert score(make(obeys, style=style), breaks) == (False, False)
    assert score(make(obeys), breaks) == (False, True)


def test_json_is_compared_by_value() -> None:
    example = make('{"name": "Ida", "age": 7}', "extract")
    assert score(example, '{"age": 7, "name": "Ida"}') == (True, True)
    assert score(example, '{"age": "7", "name": "Ida"}') == (False, True)
    assert score(example, '{"name": "Ida"}') == (False, True)
    assert score(example, '{"name": "Ida", "age": 7') == (False, False)


def test_calls_are_compared_by_value_and_in_order() -> None:
    example, (rome, oslo) = calling(), CALLS
    turned = {"arguments": {"days": 1, "city": "Rome"}, "name": "weather"}
    assert score(example, written(rome, oslo)) == (True, True)
    assert score(example, written(turned, oslo)) == (True, True)
    assert score(example, written(oslo, rome)) == (False, True)
    assert score(example, written(rome)) == (False, True)
    assert score(example, written(rome, {**oslo, "arguments": {"city": "Oslo"}})) == (False, True)
    assert score(example, written(rome, oslo).replace("}\n", "\n")) == (False, False)
    assert score(example, "I don't know the weather.") == (False, False)


@pytest.mark.parametrize("text", ["5", '"my name"', "[]", "null", json.dumps(CALLS[0]), written(5)])
def test_what_is_not_a_call_is_not_well_formed(text: str) -> None:
    assert score(calling(), text) == (False, False)


def test_stories() -> None:
    request = "Tell me a story about a fox named Ida."
    assert is_story(request, STORY, STORY)
    assert not is_story(request, STORY, STORY.replace("Ida", "Leo"))
    assert not is_story(request, STORY, STORY.replace("It was red. It had a plan.", ""))
    assert not is_story(request, STORY, STORY.replace("It had a plan", "It was red"))
    assert is_story("Tell me a story about an owl.", "An owl met an ant.", STORY.replace("fox", "owl"))
    example = make(STORY, "stories", user=request)
    assert score(example, STORY) == (True, True)
    assert score(example, STORY, ended=False) == (False, False)


def test_steps_of_drafting() -> None:
    """40 tokens after the one at place 9, which the prompt's step gave."""
    right, wrong = torch.ones(4, 50, dtype=torch.bool), torch.zeros(4, 50, dtype=torch.bool)
    assert num_steps(right, 9) == 40 / 5
    assert num_steps(wrong, 9) == 40
    assert num_steps(right[:1], 9) == 40 / 2
    assert num_steps(right[:0], 9) == 40
    assert num_steps(right, 49) == 0
    first_only = torch.cat((right[:1], wrong[1:]))
    assert num_steps(first_only, 9) == 40 / 2
    assert num_steps(torch.cat((wrong[:1], right[1:])), 9) == 40  # what follows a wrong one is of no use
    assert num_steps(right, 8) == 9  # 41 tokens: the last step gives one
    mixed = right.clone()
    mixed[:, 12] = False  # the step from 9 gives 10, 11 and 12
    assert num_steps(mixed, 9) == 1 + 8
