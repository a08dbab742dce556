"""Rules of a grammar in llguidance's dialect of Lark, and its words. Knows no calls and no schemas."""

import json
import re
from collections.abc import Callable, Hashable, Mapping, Sequence

from quire.errors import InvalidRequest

MAX_SPACE = 16  # with any number of spaces some models would never end
SPACE = rf"[ \t\r\n]{{0,{MAX_SPACE}}}"
ANY = "/(?s:.*)/"


class Rules:
    """Rules as they are needed. Whatever is added twice is there once.

    Attributes:
        specials: special tokens that a text may hold -> their ids; those that end one have none.
    """

    def __init__(self, specials: Mapping[str, int | None]):
        self.specials = specials
        self.split = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or "(?!)")
        self.bodies: dict[str, str] = {}
        self.names: dict[Hashable, str] = {}

    def word(self, body: str, option: str = "") -> str:
        """What the lexer reads at once: a terminal, or with an option of its own a rule that is nothing else."""
        name = self.names.get((body, option))
        if name is None:
            name = self.names[body, option] = f"{'w' if option else 'W'}{len(self.names)}"
            self.bodies[name + option] = body
        return name

    def rule(self, key: Hashable, alternatives: Callable[[str], Sequence[str]], bits: str = "") -> str:
        """The rule's name, of which its alternatives are made. `bits`: it has a parameter, which is that here."""
        name = self.names.get(key)
        if name is None:
            name = self.names[key] = f"r{len(self.names)}"
            head = name + ("::_" if bits else "")
            self.bodies[head] = ""  # in its place, before those it refers to
            if not (found := list(dict.fromkeys(alternatives(name)))):
                raise InvalidRequest(
                    "calls cannot be written as this model's format wants them", param="tools"
                )
            self.bodies[head] = " | ".join(found)
        return f"{name}::{bits}" if bits else name

    def parts(self, text: str) -> list[str | int] | None:
        """Text and the special tokens in it; None if one of them ends a text."""
        found, at = list[str | int](), 0
        for each in self.split.finditer(text):
            token = self.specials[each[0]]
            if token is None:
                return None
            found += [text[at : each.start()], token] if each.start() > at else [token]
            at = each.end()
        return [*found, text[at:]] if at < len(text) else found

    def said(self, text: str) -> str:
        """Exactly that text."""
        return " ".join(written(part) for part in self.parts(text) or ())

    def until(self, text: str, marker: str) -> str:
        """What `text` matches, up to the marker and with it."""
        parts = self.parts(marker) or []
        at = next((at for at, part in enumerate(parts) if isinstance(part, int)), None)
        if at is None:
            return self.word(f"{text} {written(marker)}", "[lazy]")
        before = " ".join([text, *map(written, parts[:at])])
        return " ".join([before if before in self.bodies else self.word(before), *map(written, parts[at:])])

    def source(self, start: str) -> str:
        """The whole grammar."""
        lines = [f"{name}: {body}" for name, body in self.bodies.items()]
        return "\n".join(
            ["%llguidance {}", f"start: {start}", f"SPACE: /[ \\t\\r\\n]{{1,{MAX_SPACE}}}/", *lines]
        )


def written(part: str | int) -> str:
    """A text, or a special token by its id."""
    return f"<[{part}]>" if isinstance(part, int) else json.dumps(part, ensure_ascii=False)


def pattern(text: str) -> str:
    """The text in a regular expression."""
    return re.escape(text).replace("/", r"\/").replace("\n", "n")
