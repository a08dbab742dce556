"""What llguidance makes of a schema is what the schema says, also where it needs help."""

import json
from typing import Any

import pytest

from quire.checkpoint.source import resolve
from quire.grammar.compiling import Vocabulary
from quire.grammar.source import grammar_of
from quire.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    tokenizer = Tokenizer.load(resolve("demo", weights=False).folder)
    return Vocabulary(tokenizer.to_json(), tokenizer.vocab_size, [2])


def accepts(vocabulary: Vocabulary, asked: dict[str, Any], text: str) -> bool:
    """Whether it is a whole text of a grammar."""
    matcher = vocabulary.matcher(grammar_of(asked))
    tokens = vocabulary.tokens.tokenize_str(text)
    return (
        matcher.validate_tokens(tokens) == len(tokens)
        and matcher.consume_tokens(tokens)
        and matcher.is_accepting()
    )


@pytest.mark.parametrize(
    ("bounds", "inside", "outside"),
    [
        ({"exclusiveMinimum": 6, "maximum": 6.5}, ["6.1", "6.5", "6.0001"], ["6", "6.0", "6.6", "7"]),
        (
            {"exclusiveMinimum": 0, "exclusiveMaximum": 0.25},
            ["0.1", "0.24", "0.001"],
            ["0", "-0", "0.0", "0.25"],
        ),
        ({"minimum": -0.5, "exclusiveMaximum": 0}, ["-0.5", "-0.1"], ["-0", "0", "-0.0", "-0.6"]),
        ({"minimum": -1.5, "exclusiveMaximum": -1}, ["-1.5", "-1.1"], ["-1", "-1.0", "-1.6"]),
        ({"exclusiveMinimum": 100}, ["101", "100.5"], ["100", "100.0", "99"]),
        ({"exclusiveMinimum": 2, "minimum": 3, "maximum": 4}, ["3", "4"], ["2", "2.5", "5"]),
        ({"exclusiveMinimum": 3, "minimum": 2, "maximum": 4}, ["3.5", "4"], ["2", "3", "5"]),
    ],
)
def test_a_bound_that_is_excluded_is(
    vocabulary: Vocabulary, bounds: dict[str, float], inside: list[str], outside: list[str]
) -> None:
    whole, apart = {"type": "number", **bounds}, {"allOf": [{"type": "number"}, bounds]}
    for schema in (whole, apart, {"$ref": "#/$defs/x", "$defs": {"x": whole}}):
        assert all(accepts(vocabulary, {"json": schema}, text) for text in inside)
        assert not any(accepts(vocabulary, {"json": schema}, text) for text in outside)


def test_integers_keep_their_bounds(vocabulary: Vocabulary) -> None:
    schema = {"type": "integer", "exclusiveMinimum": 6, "maximum": 2**63 - 1}
    found = [accepts(vocabulary, {"json": schema}, str(n)) for n in (6, 7, 2**62, 2**63 - 10_000, 2**63)]
    assert found == [False, True, True, True, False]


@pytest.mark.parametrize("more", [{}, {"allOf": [{"pattern": "^[0-9]"}]}, {"pattern": "^[0-9]"}])
@pytest.mark.parametrize(("name", "rest"), [("date", ""), ("date-time", "T10:00:00Z")])
def test_a_day_is_one_of_its_year(vocabulary: Vocabulary, name: str, rest: str, more: dict[str, Any]) -> None:
    schema = {"type": "string", "format": name, **more}
    days = ("2024-02-29", "2000-02-29", "2023-12-31", "2023-02-28", "2023-02-29", "1900-02-29", "2024-04-31")
    found = [accepts(vocabulary, {"json": schema}, f'"{day}{rest}"') for day in days]
    assert found == [True, True, True, True, False, False, False]


def test_what_is_no_schema_stays_as_it_is(vocabulary: Vocabulary) -> None:
    value = {"properties": {"a": 1}, "exclusiveMinimum": 3}
    for schema in ({"const": value}, {"enum": [value]}):
        asked = {"json": schema, "disable_additional_properties": True}
        assert accepts(vocabulary, asked, json.dumps(value))
    named = {
        "type": "object",
        "properties": {"exclusiveMinimum": {"type": "null"}},
        "required": ["exclusiveMinimum"],
    }
    assert accepts(vocabulary, {"json": named}, '{"exclusiveMinimum": null}')
