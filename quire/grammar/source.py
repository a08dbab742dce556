"""From `StructuredOutputsParams` to the text of a grammar that llguidance reads. Knows no tokens."""

import json
from collections.abc import Mapping
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from quire.errors import InvalidRequest

MAX_CHARS = 1 << 18  # of a schema, a regex or a grammar
MAX_DEPTH = 64  # of a schema
# Of JSON: as it is written on one line or indented. With any number of spaces some models would never end.
WHITESPACE = r"[\x20\x09]|\r?\n[\x20\x09]{0,80}"


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
        return _within(str(llguidance.LLMatcher.grammar_from_regex(_plain("regex", asked["regex"]))))
    if asked.get("choice") is not None:
        texts = (json.dumps(_plain("choice", text), ensure_ascii=False) for text in asked["choice"])
        return _within("start: " + " | ".join(dict.fromkeys(texts)))
    if asked.get("grammar") is not None:
        text = _plain("grammar", asked["grammar"])
        try:
            return _within(any_to_lark(text))
        except Exception as error:  # it raises whatever its parser does
            raise InvalidRequest(f"grammar cannot be read: {str(error)[:500]}", param="grammar") from None
    return _tags(_object("structural_tag", asked["structural_tag"]))


def _json(schema: Any, asked: Mapping[str, Any]) -> str:
    if asked.get("disable_additional_properties"):
        schema = _closed(schema)
    if isinstance(schema, dict):
        options: dict[str, Any] = {"whitespace_flexible": not asked.get("disable_any_whitespace", False)}
        if options["whitespace_flexible"]:
            options["whitespace_pattern"] = _plain(
                "whitespace_pattern", asked.get("whitespace_pattern") or WHITESPACE
            )
        schema = {**schema, "x-guidance": options}
    return _within(json.dumps({"grammars": [{"json_schema": schema}]}))


def _object(name: str, given: Any) -> Any:
    """A value, or what its JSON says."""
    if isinstance(given, str):
        _within(given, name)
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


def _closed(schema: Any) -> Any:
    """The same without properties that it does not name."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: _closed(value) for key, value in schema.items()}
    names = isinstance(inner.get("properties"), dict) and inner.get("type", "object") == "object"
    return {"additionalProperties": False, **inner} if names else inner


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
        return _within(llguidance.StructTag.to_grammar(tags, assume_special=False))
    except (KeyError, TypeError, AttributeError, AssertionError, StopIteration) as error:
        raise InvalidRequest(
            "each of structural_tag's structures must have begin, schema and end, and begin with one of its triggers:"
            f" {type(error).__name__}",
            param="structural_tag",
        ) from None


def _tag(structure: Mapping[str, Any], triggers: list[str]) -> llguidance.StructTag:
    begin = structure["begin"]
    trigger = next(each for each in triggers if each and begin.startswith(each))
    schema = json.dumps(structure["schema"])
    return llguidance.StructTag(trigger=trigger, begin=begin, grammar=schema, end=structure["end"])


def _plain(name: str, text: str) -> str:
    if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
        raise InvalidRequest(
            f"{name} holds a NUL character or half a surrogate pair; leave it out", param=name
        )
    return text


def _within(text: str, name: str = "structured_outputs") -> str:
    if len(text) > MAX_CHARS:
        raise InvalidRequest(
            f"{name} has {len(text):,} characters; at most {MAX_CHARS:,} are allowed", param=name
        )
    return text
