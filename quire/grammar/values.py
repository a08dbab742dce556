"""Arguments of one tool, as JSON or as bare text between markers, by its schema. Knows no format of calls."""

import json
import re
from collections.abc import Mapping
from typing import Any

from quire.errors import InvalidRequest
from quire.grammar.lark import ANY, Rules, written
from quire.grammar.source import spaced
from quire.text.tools.values import types_of

MAX_BITS = 64  # parameters that a rule can remember
ALWAYS = "%if ge(_, 0)"  # rules that can remember must ask for something
NOTES = frozenset(
    ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "format", "strict")
)
SHAPE = frozenset(("type", "properties", "required", "additionalProperties", "$defs", "definitions"))


class Members:
    """The members of an object, in any order.

    Attributes:
        keys: name -> schema; those that are required come first.
        extra: the schema of others; None if there may be none.
        complete: the condition under which nothing is missing.
        more: the condition under which another one may follow.
    """

    def __init__(self, schema: Mapping[str, Any], param: str = "tools"):
        unknown = sorted(
            k for k in schema.keys() - SHAPE - NOTES if not k.startswith(("$", "x-")) or k == "$ref"
        )
        if unknown:
            raise InvalidRequest(
                f"{unknown[0]!r} of an object's schema cannot be obeyed where calls are not JSON; leave it out",
                param=param,
            )
        known, extra = schema.get("properties") or {}, schema.get("additionalProperties", True)
        self.extra = None if extra is False else {} if extra is True else extra
        required = list(dict.fromkeys(schema.get("required") or ()))
        self.num_required = len(required)
        names = dict.fromkeys([*required, *known])
        self.keys = {name: known.get(name, self.extra or {}) for name in names}
        if len(self.keys) > MAX_BITS:
            raise InvalidRequest(
                f"an object has {len(self.keys)} properties; at most {MAX_BITS} are possible where calls are not JSON",
                param=param,
            )
        self.complete = f"%if is_ones([0:{self.num_required}])" if required else ALWAYS
        full = f"is_ones([0:{len(self.keys)}])"
        self.more = ALWAYS if self.extra is not None or not self.keys else f"%if not({full})"

    def __bool__(self) -> bool:
        """Whether there may be any."""
        return bool(self.keys) or self.extra is not None


class Arguments:
    """What a tool may be called with."""

    def __init__(self, rules: Rules, schema: Mapping[str, Any] | None):
        self.rules = rules
        none = {"properties": {}, "additionalProperties": False}
        self.root: dict[str, Any] = {**(none if schema is None else schema), "type": "object"}

    def json(self, schema: Mapping[str, Any] | None = None) -> str:
        """They are JSON, or a value among them is that."""
        defined: dict[str, Any] = {
            key: self.root[key] for key in ("$defs", "definitions") if key in self.root
        }
        body = f"%json {json.dumps(spaced(self.root if schema is None else {**defined, **schema}))}"
        return self.rules.rule(body, lambda _: [body])

    def fits(self, schema: Any, *, string: bool) -> bool:
        """Whether a value may be a string, or something else."""
        options, types = self._options(schema), types_of(schema, self.root)
        if options is not None:
            return any(isinstance(option, str) == string for option in options)
        return not types or ("string" in types if string else types != {"string"})

    def bare(self, schema: Any, marker: str, *, string: bool | None) -> str:
        """A value as it stands between markers, and the one after it. `string`: it is said to be one, or none."""
        said, options = self.rules.said(marker), self._options(schema)
        if options is not None:
            texts = [
                option if isinstance(option, str) else json.dumps(option)
                for option in options
                if string is None or isinstance(option, str) == string
            ]
            return rf'"\n"? ({" | ".join(map(self.rules.said, texts))}) "\n"? {said}'
        types = types_of(schema, self.root)
        if string or not types or ("string" in types and string is None):
            return self._text(self._place(schema), marker)
        value = {"allOf": [schema, {"type": sorted(types - {"string"})}]} if "string" in types else schema
        return f"SPACE? {self.json(value)} SPACE? {said}"

    def _text(self, schema: Mapping[str, Any], marker: str) -> str:
        """Bare text, without one line break at each end, as far as the schema bounds it."""
        word, least, most = ANY, schema.get("minLength", 0), schema.get("maxLength")
        if least or most is not None:
            word = f"/(?s:.{{{least},{'' if most is None else most}}})/"
        if isinstance(pattern := schema.get("pattern"), str):
            body = re.sub(r"(?<!\\)/", r"\\/", pattern.removeprefix("^").removesuffix("$"))
            ends = ["" if pattern[:1] == "^" else "(?s:.*)", "" if pattern[-1:] == "$" else "(?s:.*)"]
            word += f" & /{ends[0]}(?:{body}){ends[1]}/"
        if word != ANY:
            inner = self.rules.word(
                rf"{word} & ~/\n(?s:.*)/ & ~/(?s:.*)\n/ & ~({ANY} {written(marker)} {ANY})"
            )
            word = rf'"\n"? {inner} "\n"?'
        return self.rules.until(word, marker)

    def _options(self, schema: Any) -> list[Any] | None:
        found = self._place(schema)
        return [found["const"]] if "const" in found else found.get("enum")

    def _place(self, schema: Any) -> Mapping[str, Any]:
        return pointed(schema, self.root)


def pointed(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the schema refers to, or itself where it refers to nothing.

    Raises:
        InvalidRequest: there is no such place, or it is no schema.
    """
    for _ in range(MAX_BITS):
        if schema is True:
            schema = {}
        if not isinstance(schema, Mapping):
            break
        reference = schema.get("$ref")
        if reference is None:
            return schema
        steps = str(reference).split("/")
        schema = root if steps.pop(0) == "#" else None
        for step in steps:
            schema = schema.get(step) if isinstance(schema, Mapping) else None
    raise InvalidRequest("a schema is no object, or refers to nothing", param="tools")
