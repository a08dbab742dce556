"""From `StructuredOutputsParams` to the text of a grammar that llguidance reads. Knows no tokens."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from quire.errors import InvalidRequest

MAX_CHARS = 1 << 18  # of a schema, a regex or a grammar
MAX_DEPTH = 64  # of a schema
DATES = (  # without 29 February of years that have none
    r"^(\d{4}-(0[13-9]|1[0-2])|\d{4}-02-([01]\d|2[0-8])"
    r"|(\d\d(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)-02-29)"
)
STEP_ULPS = 4  # it reads a double as one of its neighbours
TINY = 1e-15  # at least so far is a number from a bound that is excluded: next to 0 there are doubles of 300 digits
# Of JSON: as it is written on one line or indented. With any number of spaces some models would never end.
WHITESPACE = r"[\x20\x09]|\r?\n[\x20\x09]{0,80}"
NAMED = frozenset(
    ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
)  # hold schemas by name
VALUES = frozenset(("const", "enum", "default", "examples"))  # hold no schemas


def grammar_of(asked: Mapping[str, Any]) -> str:
    """The grammar; `asked` are the fields of `StructuredOutputsParams` that are not their defaults.

    Raises:
        InvalidRequest: it is too long, nested too deeply, or not what it should be.
    """
    if asked.get("json") is not None:
        return _json(_object("json", asked["json"]), asked)
    if asked.get("json_object"):
        return _json({"type": "object"}, asked)
    if asked.get("regex") is not None:
        return within(str(llguidance.LLMatcher.grammar_from_regex(_plain("regex", asked["regex"]))))
    if asked.get("choice") is not None:
        texts = (json.dumps(_plain("choice", text), ensure_ascii=False) for text in asked["choice"])
        return within("start: " + " | ".join(dict.fromkeys(texts)))
    if asked.get("grammar") is not None:
        text = _plain("grammar", asked["grammar"])
        try:
            return within(any_to_lark(text))
        except Exception as error:  # it raises whatever its parser does
            raise InvalidRequest(f"grammar cannot be read: {str(error)[:500]}", param="grammar") from None
    return _tags(_object("structural_tag", asked["structural_tag"]))


def _json(schema: Any, asked: Mapping[str, Any]) -> str:
    schema = _changed(schema, _exact)
    if asked.get("disable_additional_properties"):
        schema = _changed(schema, _closed)
    if isinstance(schema, dict):
        spaces = _plain("whitespace_pattern", asked.get("whitespace_pattern") or WHITESPACE)
        schema = spaced(schema, None if asked.get("disable_any_whitespace") else spaces)
    return within(json.dumps({"grammars": [{"json_schema": schema}]}))


def spaced(schema: Mapping[str, Any], spaces: str | None = WHITESPACE) -> dict[str, Any]:
    """The schema, with what may stand between JSON's words, in llguidance's own keyword; None: nothing."""
    options = {"whitespace_flexible": spaces is not None}
    return {**schema, "x-guidance": options if spaces is None else {**options, "whitespace_pattern": spaces}}


def _object(name: str, given: Any) -> Any:
    """A value, or what its JSON says."""
    if isinstance(given, str):
        within(given, name)
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{name} is not JSON: {error}", param=name) from None
    if not isinstance(given, dict | bool):
        raise InvalidRequest(f"{name} is a {type(given).__name__}; it must be an object", param=name)
    level, depth = [given], 0
    while level:
        if (depth := depth + 1) > MAX_DEPTH:
            raise InvalidRequest(
                f"{name} is nested more than {MAX_DEPTH} levels deep; flatten it", param=name
            )
        inner = [each for each in level if isinstance(each, dict | list)]
        level = [v for each in inner for v in (each.values() if isinstance(each, dict) else each)]
    return given


def _changed(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """The same, with each schema in it, itself last, changed."""
    if isinstance(schema, list):
        return [_changed(each, change) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = dict(schema)
    for key, value in schema.items():
        if key in NAMED and isinstance(value, dict):
            inner[key] = {name: _changed(each, change) for name, each in value.items()}
        elif key not in VALUES:
            inner[key] = _changed(value, change)
    return change(inner)


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The same without properties that it does not name."""
    names = isinstance(schema.get("properties"), dict) and schema.get("type", "object") == "object"
    return {"additionalProperties": False, **schema} if names else schema


def _exact(schema: dict[str, Any]) -> dict[str, Any]:
    """As llguidance keeps it: it rounds integers to doubles, and allows some excluded bounds, and leap days."""
    bounds: dict[str, Any] = {}
    for kept, excluded, inwards, tightest in (
        ("minimum", "exclusiveMinimum", 1, max),
        ("maximum", "exclusiveMaximum", -1, min),
    ):
        given = {key: schema[key] for key in (kept, excluded) if type(schema.get(key)) in (int, float)}
        inside = {key: _inside(bound, inwards, key == excluded) for key, bound in given.items()}
        if inside != given:
            bounds[kept] = tightest(inside.values())
            schema = {key: value for key, value in schema.items() if key not in given}
    if schema.get("format") in ("date", "date-time") and isinstance(schema.get("allOf", []), list):
        bounds["allOf"] = [*schema.get("allOf", []), {"pattern": DATES}]
    return schema | bounds


def _inside(bound: float, inwards: int, is_excluded: bool) -> float:
    """The bound itself, or a double just inside of it where llguidance would get it wrong."""
    try:
        near = float(bound)
    except OverflowError:
        raise InvalidRequest("json has a bound that is no double; leave it out", param="json") from None
    taken = is_excluded and near.is_integer() and near * inwards >= 0  # it would allow 6 in 6 < x < 6.5
    outside = near < bound if inwards > 0 else near > bound
    return near + inwards * max(STEP_ULPS * math.ulp(near), TINY) if taken or outside else bound


def _tags(tag: Any) -> str:
    """vLLM's structures: text, and from each trigger on one of those that begin with it."""
    structures, triggers = (
        tag.get(key) if isinstance(tag, dict) else None for key in ("structures", "triggers")
    )
    if not structures or not triggers:
        raise InvalidRequest(
            "structural_tag must have 'structures' and 'triggers'; write a format of another kind as a grammar",
            param="structural_tag",
        )
    try:
        tags = [_tag(each, triggers) for each in structures]
        return within(llguidance.StructTag.to_grammar(tags, assume_special=False))
    except (KeyError, TypeError, AttributeError, AssertionError, StopIteration) as error:
        raise InvalidRequest(
            "each of structural_tag's structures must have begin, schema and end, and begin with one of its triggers:"
            f" {type(error).__name__}",
            param="structural_tag",
        ) from None


def _tag(structure: Mapping[str, Any], triggers: list[str]) -> llguidance.StructTag:
    begin = structure["begin"]
    trigger = next(each for each in triggers if each and begin.startswith(each))
    schema = json.dumps(_changed(structure["schema"], _exact))
    return llguidance.StructTag(trigger=trigger, begin=begin, grammar=schema, end=structure["end"])


def _plain(name: str, text: str) -> str:
    if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
        raise InvalidRequest(
            f"{name} holds a NUL character or half a surrogate pair; leave it out", param=name
        )
    return text


def read_schema(given: Any) -> Any:
    """The schema of a tool's arguments; None where there is none.

    Raises:
        InvalidRequest: it is no object, or nested too deeply.
    """
    return None if given is None else _object("parameters", given)


def within(text: str, name: str = "structured_outputs") -> str:
    """The text, which is not too long.

    Raises:
        InvalidRequest: it is.
    """
    if len(text) > MAX_CHARS:
        raise InvalidRequest(
            f"{name} has {len(text):,} characters; at most {MAX_CHARS:,} are allowed", param=name
        )
    return text
