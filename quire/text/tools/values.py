"""Parameters that models write as bare text, made JSON by the tool's schema. Knows no format."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from quire.text.tools.notation import NUMBER, quoted

TYPES = frozenset(("string", "integer", "number", "boolean", "null", "object", "array"))
STRING = frozenset(("string",))
MOST_PLACES = 64  # of a schema that are looked at for one parameter
TRUE, FALSE = ("true", "True", "1"), ("false", "False", "0")

Parameters = Mapping[str, Mapping[str, frozenset[str]]]  # tool -> parameter -> the types it may have


def parameters_of(tools: Sequence[Mapping[str, Any]]) -> Parameters:
    """What the schemas of `tools`, in OpenAI's format, say about their parameters. A parameter without types is any."""
    found: dict[str, dict[str, frozenset[str]]] = {}
    for tool in tools:
        function = tool.get("function", tool)
        schema = function.get("parameters") or {}
        properties = schema.get("properties")
        known = properties.items() if isinstance(properties, Mapping) else ()
        found[function["name"]] = {name: types_of(value, schema) for name, value in known}
    return found


def types_of(schema: object, root: Mapping[str, Any]) -> frozenset[str]:
    """The types that a value may have; none are known where it may have any. References are into `root`."""
    return _types(schema, root, set())


def _types(schema: object, root: Mapping[str, Any], seen: set[int]) -> frozenset[str]:
    """`seen`: places that were looked at, because schemas may refer to themselves, or to one place many times."""
    if not isinstance(schema, Mapping) or id(schema) in seen or len(seen) >= MOST_PLACES:
        return frozenset()
    seen.add(id(schema))
    named = schema.get("type")
    if named is not None:
        names = named if isinstance(named, list) else [named]
        return TYPES & {name for name in names if isinstance(name, str)}
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(options := schema.get(key), list):
            return frozenset().union(*(_types(option, root, seen) for option in options))
    if isinstance(reference := schema.get("$ref"), str) and reference.startswith("#/"):
        place: object = root
        for step in reference[2:].split("/"):
            place = place.get(step) if isinstance(place, Mapping) else None
        return _types(place, root, seen)
    values = schema.get("enum", [schema.get("const")])
    strings = isinstance(values, list) and values and all(isinstance(value, str) for value in values)
    return STRING if strings else frozenset()


def is_string(types: frozenset[str] | None) -> bool:
    """The text is a string whatever it says."""
    return types == STRING


def as_json(text: str, types: frozenset[str] | None) -> str:
    """The value as JSON: the first of `types` that it can be; without types whatever JSON it is; else a string."""
    bare = text.strip()
    if not types:
        return bare if _is_json(bare, object) else quoted(text)
    if "null" in types and bare in ("null", "None"):
        return "null"
    if types & {"integer", "number"} and NUMBER.fullmatch(bare):
        whole, _, rest = bare.partition(".")
        is_whole = "number" not in types and rest and not rest.strip("0")
        return whole if is_whole else bare
    if "boolean" in types and bare in TRUE + FALSE:
        return "true" if bare in TRUE else "false"
    if "object" in types and _is_json(bare, dict) or "array" in types and _is_json(bare, list):
        return bare
    return quoted(text)


def _is_json(text: str, kind: type) -> bool:
    try:
        return isinstance(json.loads(text, parse_constant=_refuse), kind)
    except (ValueError, RecursionError):
        return False


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
