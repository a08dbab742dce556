"""Calls that are JSON objects with a name and arguments. Knows no markers."""

from collections.abc import Callable, Generator

from quire.text.tools.notation import json_string, json_value
from quire.text.tools.source import Emit, Reading, Source

NAMES = ("name", "tool_name", "function")
ARGUMENTS = ("arguments", "parameters", "args")
NESTED = "function"  # OpenAI's form: {"type": "function", "function": {...}}


def json_calls(
    source: Source, opened: str, begin: Callable[[str], bool], argue: Emit, end: Callable[[], None]
) -> Reading:
    """Read an object, or several between commas, semicolons or brackets; False if the first one is no call.

    `begin` is told a call's name, and says False if it can be none; `argue` takes its arguments in pieces.
    """
    any_begun, listed = False, opened == "["
    while True:
        char = opened or (yield from source.solid())
        if char in ("{", "[", ",", ";", "]") and not opened:
            source.take(source.at + 1)
        opened = ""
        if char == "{":
            begun, whole = yield from _object(source, begin, argue)
            any_begun |= begun
            if not whole:
                return any_begun
            if begun:
                end()
        elif char == "[" and not any_begun:
            listed = True
        elif char == "]" or char not in ("[", ",", ";"):
            return any_begun
        if listed or char != "{":
            continue
        if (yield from source.solid()) not in (",", ";", "{"):
            return any_begun


def _object(
    source: Source, begin: Callable[[str], bool], argue: Emit
) -> Generator[None, None, tuple[bool, bool]]:
    """Read the rest of an object; whether it is a call, and whether it is whole."""
    begun, depth = False, 1
    held: list[str] = []  # arguments that come before the name
    while depth:
        char = yield from source.solid()
        if char in ("}", ","):
            source.take(source.at + 1)
            depth -= char == "}"
            continue
        key = yield from json_string(source)
        if key is None or (yield from source.solid()) != ":":
            return begun, False
        source.take(source.at + 1)
        char = yield from source.solid()
        if key == NESTED and char == "{":
            source.take(source.at + 1)
            depth += 1
        elif key in NAMES and char == '"' and not begun:
            name = yield from json_string(source)
            if name is None or not begin(name):
                return False, False
            begun = True
            for piece in held:
                argue(piece)
        elif key in ARGUMENTS:
            if not (yield from arguments(source, argue if begun else held.append)):
                return begun, False
        elif not (yield from json_value(source, _drop)):
            return begun, False
    return begun, True


def arguments(source: Source, emit: Emit) -> Reading:
    """Emit arguments: an object, or one that is written as a string; null is none. False if they break off."""
    char = yield from source.solid()
    if char != '"':
        return (yield from json_value(source, emit if char in ("{", "[") else _drop))
    text = yield from json_string(source)
    if text is not None:
        emit(text)
    return text is not None


def _drop(_: str) -> None:
    pass
