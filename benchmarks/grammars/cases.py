"""What texts may be asked to look like, drawn at random, and whether a text does: by other libraries than llguidance.

Schemas are checked by jsonschema, regular expressions by regex, what grammars describe by a few lines of Python each.
"""

import ast
import datetime
import ipaddress
import json
import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import jsonschema
import regex

Json = dict[str, Any]
Check = Callable[[str], bool]
CLOSING = ('"', "}", "]", '"}', '",')  # a model without aim would seldom end
LETTERS = "abcxyzäß中é🙂"
FORMATS = jsonschema.FormatChecker(())


def _instant(text: str) -> datetime.datetime:
    """Python knows no leap seconds, no year 0, and fewer digits of a second."""
    text = regex.sub("^0000", "2000", regex.sub(r"(?<=:\d\d):60", ":59", text.upper()))
    return datetime.datetime.fromisoformat(regex.sub(r"(\.\d{1,6})\d*", r"\1", text))


READERS: dict[str, Callable[[str], object]] = {
    "date": lambda text: _instant(f"{text}T00:00:00Z"),
    "date-time": _instant,
    "ipv4": ipaddress.IPv4Address,
    "uuid": uuid.UUID,
}
for name, read in READERS.items():
    FORMATS.checks(name, ValueError)(
        lambda value, read=read: not isinstance(value, str) or bool(str(read(value)))
    )


@dataclass(frozen=True)
class Case:
    """Fields of `StructuredOutputsParams`, and whether a whole text is as they say.

    Attributes:
        likely: texts whose tokens the model is made to say now and then.
        ends: whether a text of it is complete at some point; free text with tags in it is at any.
    """

    kind: str
    asked: Json
    is_valid: Check
    likely: Sequence[str] = ()
    ends: bool = True


def draw_case(chance: random.Random) -> Case:
    """One of any kind; most are of JSON."""
    kinds = [_schema_case] * 6 + [
        _object_case,
        _regex_case,
        _regex_case,
        _choice_case,
        _grammar_case,
        _tag_case,
    ]
    return chance.choice(kinds)(chance)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def by_schema(schema: Any) -> Check:
    """Of names that come twice, which JSON allows, the first value counts as well as the last. Numbers are decimals."""
    exact = json.loads(json.dumps(schema), parse_float=Decimal)
    validator = jsonschema.Draft202012Validator(exact, format_checker=FORMATS)

    def check(text: str) -> bool:
        try:
            last = json.loads(text, parse_float=Decimal, parse_constant=_refuse)
            first = json.loads(
                text, parse_float=Decimal, object_pairs_hook=lambda pairs: dict(reversed(pairs))
            )
        except ValueError:
            return False
        return validator.is_valid(last) and validator.is_valid(first)

    return check


def _schema_case(chance: random.Random) -> Case:
    schemas = Schemas(chance)
    schema = schemas.object(2) if chance.random() < 0.8 else schemas.any(2)
    if schemas.uses_node:
        schema = {**schema, "$defs": {"node": schemas.node()}}
    asked: Json = {"json": schema if chance.random() < 0.7 else json.dumps(schema)}
    return Case("json", asked | _spaces(chance), by_schema(schema), CLOSING)


def _object_case(chance: random.Random) -> Case:
    return Case(
        "json_object", {"json_object": True} | _spaces(chance), by_schema({"type": "object"}), CLOSING
    )


def _spaces(chance: random.Random) -> Json:
    return chance.choice(
        [{"disable_any_whitespace": True}, {"disable_any_whitespace": True}, {"whitespace_pattern": " ?"}, {}]
    )


@dataclass
class Schemas:
    """Draws schemas of up to some depth."""

    chance: random.Random
    uses_node: bool = field(default=False, init=False)

    def any(self, depth: int) -> Json:
        simple = (
            self.integer,
            self.number,
            self.string,
            self.pattern,
            self.format,
            self.one_of_some,
            self.mixed,
        )
        nested = (self.object, self.array, self.either, self.both, self.reference) if depth else ()
        draw = self.chance.choice(simple + nested)
        return draw(depth - 1) if draw in nested else draw()  # type: ignore[call-arg]

    def integer(self) -> Json:
        low = self.chance.randint(-1000, 1000)
        high = low + self.chance.choice([3, 50, 100_000])
        least, most = self.chance.choice([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")])
        multiple = self.chance.random() < 0.1
        return {
            "type": "integer",
            **({"multipleOf": 3, "minimum": 0} if multiple else {least: low, most: high}),
        }

    def number(self) -> Json:
        low = round(self.chance.uniform(-10, 10), self.chance.randint(0, 3))
        least, most = self.chance.choice([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")])
        return {"type": "number", least: low, most: round(low + self.chance.choice([0.5, 1, 12.25]), 3)}

    def string(self) -> Json:
        least = self.chance.randint(0, 3)
        return {"type": "string", "minLength": least, "maxLength": least + self.chance.randint(0, 8)}

    def pattern(self) -> Json:
        inner = draw_regex(self.chance, 2)
        return {
            "type": "string",
            "pattern": f"^{inner}$" if self.chance.random() < 0.9 else f"[ab]{{2}}{inner}",
        }

    def format(self) -> Json:
        return {"type": "string", "format": self.chance.choice(["date", "date-time", "uuid", "ipv4"])}

    def one_of_some(self) -> Json:
        values = ["red", 'a "b"', "ä\n", 3, -1.5, None, True, False, ["x", 1], {"k": [2]}, ""]
        chosen = self.chance.sample(values, self.chance.randint(1, 5))
        return {"const": chosen[0]} if len(chosen) == 1 else {"enum": chosen}

    def mixed(self) -> Json:
        return {"type": self.chance.sample(["null", "boolean", "integer"], 2), "minimum": -5, "maximum": 5}

    def object(self, depth: int) -> Json:
        names = self.chance.sample(
            ["a", "b c", 'q"', "ключ", "long_name", "0", "a\\b"], self.chance.randint(1, 3)
        )
        properties = {name: self.any(depth) for name in names}
        needed = [name for name in names if self.chance.random() < 0.7]
        more = self.chance.choice([False, False, False, {"type": "integer", "minimum": 0, "maximum": 9}])
        found: Json = {
            "type": "object",
            "properties": properties,
            "required": needed,
            "additionalProperties": more,
        }
        if self.chance.random() < 0.1:
            found["patternProperties"] = {"^x_[a-c]{1,2}$": {"type": "boolean"}}
        return found

    def array(self, depth: int) -> Json:
        least = self.chance.randint(0, 2)
        size = {"minItems": least, "maxItems": least + self.chance.randint(0, 3)}
        if self.chance.random() < 0.3:
            return {
                "type": "array",
                "prefixItems": [self.any(depth), self.any(depth)],
                "items": False,
                "minItems": 2,
            }
        return {"type": "array", "items": self.any(depth), **size}

    def either(self, depth: int) -> Json:
        return {"anyOf": [self.any(depth) for _ in range(self.chance.randint(2, 3))]}

    def both(self, _: int) -> Json:
        return {"allOf": [{"type": "integer", "minimum": self.chance.randint(0, 9)}, {"maximum": 12}]}

    def reference(self, _: int) -> Json:
        self.uses_node = True
        return {"$ref": "#/$defs/node"}

    def node(self) -> Json:
        """A list of itself, which ends."""
        following = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}
        properties = {"value": self.integer(), "next": following}
        return {
            "type": "object",
            "properties": properties,
            "required": ["value", "next"],
            "additionalProperties": False,
        }


def draw_regex(chance: random.Random, depth: int) -> str:
    """One that most texts of end soon, of what Python, Rust and JSON Schema agree about."""
    atoms = ["[a-f]", r"\d", r"\w", "[^x\\s]", ".", "[äöü]", "x", "中", r"\.", "-", r"\+", '"', "[0-9]{2}"]
    parts = []
    for _ in range(chance.randint(1, 4)):
        if depth and chance.random() < 0.4:
            part = "(" + "|".join(draw_regex(chance, depth - 1) for _ in range(chance.randint(1, 3))) + ")"
        else:
            part = chance.choice(atoms)
        repeated = "" if part.endswith("}") else chance.choice(["", "", "", "?", "{2}", "{1,3}", "{0,2}"])
        parts.append(part + repeated)
    return "".join(parts)


def _regex_case(chance: random.Random) -> Case:
    pattern = draw_regex(chance, 2)
    compiled = regex.compile(pattern)
    return Case("regex", {"regex": pattern}, lambda text: compiled.fullmatch(text) is not None)


def _choice_case(chance: random.Random) -> Case:
    pieces = ["yes", "no", " ", "\n", '"', "\\", "Ж", *LETTERS]
    texts = {"".join(chance.choices(pieces, k=chance.randint(1, 6))) for _ in range(chance.randint(1, 12))}
    texts |= {text + "!" for text in texts if chance.random() < 0.3}
    return Case("choice", {"choice": sorted(texts)}, texts.__contains__)


ARITHMETIC = r"""
start: sum
sum: product (("+" | "-") product)~0..3
product: atom (("*" | "/") atom)~0..2
atom: NUMBER | NAME | "(" sum ")"
NUMBER: /0|[1-9][0-9]{0,3}/
NAME: /[a-z]{1,3}_/
"""
LISTS = r"""
start: list
list: "(" [item (" " item)~0..3] ")"
item: ATOM | list
ATOM: /[a-z]{1,4}/
"""
GBNF = r"""
root ::= entry ("\n" entry)*
entry ::= [a-z] [a-z0-9]? "=" value ";"
value ::= "\"" [^"\n]? "\"" | "-"? [0-9] [0-9]?
"""


def _is_arithmetic(text: str) -> bool:
    if regex.search(r"[^a-z_0-9+\-*/()]|\*\*|//|[-+*/(][-+*/]", text):
        return False
    try:
        nodes = ast.walk(ast.parse(text, mode="eval"))
    except (SyntaxError, ValueError):
        return False
    known = ast.Expression | ast.BinOp | ast.operator | ast.Name | ast.Constant | ast.Load
    return all(isinstance(node, known) for node in nodes)


def _is_lists(text: str) -> bool:
    """Whatever is innermost turns to an atom, again and again."""
    while (inner := regex.sub(r"\(([a-z]{1,4}( [a-z]{1,4}){0,3})?\)", "a", text)) != text:
        if inner == "a":
            return True
        text = inner
    return False


def _grammar_case(chance: random.Random) -> Case:
    entry = r'[a-z][a-z0-9]?=("[^"\n]?"|-?[0-9][0-9]?);'
    entries = regex.compile(rf"{entry}(\n{entry})*")
    grammars: list[tuple[str, Check]] = [
        (ARITHMETIC, _is_arithmetic),
        (LISTS, _is_lists),
        (GBNF, lambda text: entries.fullmatch(text) is not None),
    ]
    grammar, check = chance.choice(grammars)
    return Case("grammar", {"grammar": grammar}, check)


def _tag_case(chance: random.Random) -> Case:
    schemas = [Schemas(chance).string(), Schemas(chance).integer(), {"enum": ["</t", "v"]}]
    names = chance.sample(["<t>", "<tool>", "<t 2>"], chance.randint(1, 3))
    structures = [
        {"begin": name, "schema": schema, "end": "</t>"} for name, schema in zip(names, schemas, strict=False)
    ]
    checks = {name: by_schema(structure["schema"]) for name, structure in zip(names, structures, strict=True)}
    decoder = json.JSONDecoder()

    def check(text: str) -> bool:
        while (at := text.find("<t")) >= 0:
            name = next((name for name in names if text.startswith(name, at)), None)
            if name is None:
                return False
            begin = at + len(name) + len(text[at + len(name) :]) - len(text[at + len(name) :].lstrip())
            try:
                end = decoder.raw_decode(text, begin)[1]
            except ValueError:
                return False
            rest = text[end:].lstrip()
            if not checks[name](text[begin:end]) or not rest.startswith("</t>"):
                return False
            text = rest.removeprefix("</t>")
        return True

    asked = {"structural_tag": {"structures": structures, "triggers": ["<t"]}}
    return Case("structural_tag", asked, check, likely=("<", "t", "<t", "</"), ends=False)
