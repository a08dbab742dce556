"""All formats, read from their files, and which one a chat template shows. Knows no tokenizer."""

import tomllib
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from quire.errors import ConfigError
from quire.text.tools.format import Format, Reasoning, Role, State

TEXT = Path(__file__).parents[1]
Named = TypeVar("Named", bound=Format | Reasoning)


@cache
def tool_formats() -> tuple[Format, ...]:
    """Formats of calls; of those whose signs a template shows, the first one is it."""
    return tuple(
        Format(**{**table, "states": {name: _state(**fields) for name, fields in table["states"].items()}})
        for table in _tables("tools/formats")
    )


@cache
def reasonings() -> tuple[Format | Reasoning, ...]:
    """Formats of reasoning, in the same way."""
    whole = (each for each in tool_formats() if each.reasons)
    return (*whole, *(Reasoning(**table) for table in _tables("reasoning")))


def tool_format(name: str, templates: Iterable[str]) -> Format | None:
    """The format of that name; for "auto" the one that templates show; None for "none", or if they show none.

    Raises:
        ConfigError: there is none of that name.
    """
    return _chosen("tool_call_parser", tool_formats(), name, templates)


def reasoning_format(name: str, templates: Iterable[str]) -> Format | Reasoning | None:
    """As `tool_format`, of reasoning.

    Raises:
        ConfigError: there is none of that name.
    """
    return _chosen("reasoning_parser", reasonings(), name, templates)


def _chosen(option: str, formats: Sequence[Named], name: str, templates: Iterable[str]) -> Named | None:
    if name == "auto":
        texts = list(templates)
        return next((each for each in formats if any(_shows(text, each.signs) for text in texts)), None)
    known = {known: each for each in formats for known in each.names}
    if name not in ("none", *known):
        raise ConfigError(f"{option} is {name!r}; it must be one of auto, none, {', '.join(sorted(known))}")
    return known.get(name)


def _shows(template: str, signs: Sequence[Sequence[str]]) -> bool:
    return any(all(sign in template for sign in together) for together in signs)


def _tables(folder: str) -> list[dict[str, Any]]:
    tables = [tomllib.loads(path.read_text("utf-8")) for path in sorted((TEXT / folder).glob("*.toml"))]
    return sorted(tables, key=lambda table: int(table.get("order", 0)))


def _state(role: str, **fields: Any) -> State:
    return State(Role[role.upper()], **fields)
