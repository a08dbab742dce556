"""Arguments in a programming language's notation, by their schema: Python's, and Gemma's with its own quotes."""

import json
from collections.abc import Mapping
from typing import Any

from quire.errors import InvalidRequest
from quire.grammar.lark import ANY, Rules, written
from quire.grammar.values import NOTES, Arguments, Members, pointed
from quire.text.tools.format import State

BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
KEYWORDS = {
    "string": {"minLength", "maxLength"},
    "array": {"items", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
    "integer": {*BOUNDS},
    "number": {*BOUNDS},
    "boolean": set[str](),
    "null": set[str](),
}
CHARS = {quote: rf"([^{quote}\\\x00-\x1f]|\\['\"\\nrt])" for quote in ("'", '"')}
NAMES = r"/[A-Za-z_][A-Za-z0-9_]{0,63}/"


class Literals:
    """Of one tool, in the notation of a state of role MEMBERS."""

    def __init__(self, rules: Rules, arguments: Arguments, state: State):
        self.rules, self.arguments, self.state = rules, arguments, state
        self.python = state.escapes
        self.words = {True: "True", False: "False", None: "None"}
        if not self.python:
            self.words = {True: "true", False: "false", None: "null"}

    def members(self) -> str:
        """All arguments, up to the bracket that closes them."""
        return self._object(self.arguments.root, self.state.close, "=" if self.python else ":", nested=False)

    def _value(self, schema: Any) -> str:
        key = ("literal", self.python, json.dumps(schema, sort_keys=True), json.dumps(self._defined()))
        return self.rules.rule(key, lambda _: self._kinds(pointed(schema, self.arguments.root)))

    def _defined(self) -> Any:
        return [self.arguments.root.get(key) for key in ("$defs", "definitions")]

    def _kinds(self, schema: Mapping[str, Any]) -> list[str]:
        for name in ("anyOf", "oneOf"):
            if name in schema:
                self._check(schema, {name})
                return [self._value(option) for option in schema[name]]
        if len(schema.get("allOf", ())) == 1:
            self._check(schema, {"allOf"})
            return [self._value(schema["allOf"][0])]
        if "const" in schema or "enum" in schema:
            self._check(schema, {"const", "enum"})
            return [each for v in schema.get("enum", [schema.get("const")]) for each in self._constant(v)]
        named = schema.get(
            "type", "object" if "properties" in schema else "array" if "items" in schema else None
        )
        if named is None:
            self._check(schema, set())
            named = [*KEYWORDS.keys() - {"integer"}]
        types = named if isinstance(named, list) else [named]
        self._check(schema, {keyword for kind in types for keyword in KEYWORDS.get(kind, ())})
        return [self._kind(kind, schema) for kind in sorted(types)]

    def _check(self, schema: Mapping[str, Any], known: set[str]) -> None:
        if unknown := sorted(schema.keys() - known - NOTES - {"type", "$defs", "definitions", "$schema"}):
            raise InvalidRequest(
                f"{unknown[0]!r} of a schema cannot be obeyed where calls are not JSON; leave it out",
                param="tools",
            )

    def _kind(self, kind: str, schema: Mapping[str, Any]) -> str:
        match kind:
            case "string":
                return self._string(schema)
            case "integer" | "number":
                bounds = {key: schema[key] for key in BOUNDS if key in schema}
                return self.arguments.json({"type": kind, **bounds})
            case "boolean":
                return f'("{self.words[True]}" | "{self.words[False]}")'
            case "null":
                return f'"{self.words[None]}"'
            case "array":
                return self._array(schema)
            case "object":
                return f'"{{" {self._object(schema, "}", ":", nested=True)}'
        raise InvalidRequest(f"type {kind!r} of a schema is none of {', '.join(KEYWORDS)}", param="tools")

    def _string(self, schema: Mapping[str, Any]) -> str:
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        times = f"{{{least},{'' if most is None else most}}}"
        if self.python:
            return self.rules.word(
                "/" + "|".join(f"{q}{chars}{times}{q}" for q, chars in CHARS.items()) + "/"
            )
        (quote,) = self.state.quotes
        said, word = self.rules.said(quote), f"/(?s:.{times})/"
        if said.startswith("<"):
            return f"{said} {self.rules.word(word)} {said}"
        inner = self.rules.word(f"{word} & ~({ANY} {written(quote)} {ANY})")
        return f"{said} {self.rules.word(f'{inner} {written(quote)}', '[lazy]')}"

    def _constant(self, value: Any) -> list[str]:
        if value is None or isinstance(value, bool):
            return [f'"{self.words[value]}"']
        if isinstance(value, str) and self.python:
            escaped = (
                value.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
            )
            return [written(q + escaped.replace(q, "\\" + q) + q) for q in CHARS]
        if isinstance(value, str):
            quote = self.state.quotes[0]
            return [self.rules.said(quote + value + quote)]
        if isinstance(value, int | float):
            return [written(json.dumps(value))]
        raise InvalidRequest(
            "an enum of lists or objects cannot be obeyed where calls are not JSON", param="tools"
        )

    def _array(self, schema: Mapping[str, Any]) -> str:
        item = self._value(schema.get("items", True))
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        more = f"{{{max(least - 1, 0)},{'' if most is None else max(most - 1, 0)}}}"
        items = "" if most == 0 else f'{item} (SPACE? "," SPACE? {item}){more} SPACE?'
        return f'"[" SPACE? {items if least or not items else f"({items})?"} "]"'

    def _object(self, schema: Mapping[str, Any], close: str, sign: str, *, nested: bool) -> str:
        members = Members(schema)
        names = {key: self._name(key, nested=nested) for key in members.keys}
        key = (
            "object",
            self.python,
            close,
            nested,
            json.dumps(schema, sort_keys=True),
            json.dumps(self._defined()),
        )

        def items(rest: str, lead: str) -> list[str]:
            found = [f"SPACE? {written(close)} {members.complete}"]
            for bit, (name, each) in enumerate(members.keys.items()):
                value = f"{names[name]} SPACE? {written(sign)} SPACE? {self._value(each)} SPACE?"
                found.append(f"{lead} SPACE? {value} {rest}::set_bit({bit}) %if bit_clear({bit})")
            if members.extra is not None:
                other = self._other(list(members.keys), nested=nested)
                value = f"{other} SPACE? {written(sign)} SPACE? {self._value(members.extra)} SPACE?"
                found.append(f"{lead} SPACE? {value} {rest}::_")
            return found

        rest = self.rules.rule((*key, "rest"), lambda name: items(name, '","'), "_").removesuffix("::_")
        return self.rules.rule((*key, "first"), lambda _: items(rest, ""), "0x0")

    def _name(self, key: str, *, nested: bool) -> str:
        if nested and self.python:
            return f"({' | '.join(self._constant(key))})"
        return self.rules.said(key)

    def _other(self, known: list[str], *, nested: bool) -> str:
        """A name that the schema does not have."""
        if nested and self.python:
            return self._string({"maxLength": 64})
        return self.rules.word(NAMES + "".join(f" & ~{written(name)}" for name in known))
