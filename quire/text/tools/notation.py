"""JSON as it comes, and Python's and Gemma's notations made into JSON. Knows no calls; evaluates nothing."""

import json
import re
from collections.abc import Generator, Sequence

from quire.text.tools.source import Emit, Reading, Source, markers_of

OUTSIDE = re.compile(r'["{}\[\]]|[^\s\w.,:+\-]')  # what matters, and what JSON has only in strings
WITHIN = re.compile(r'["\\\udc00-\udfff]')  # special tokens, too, end a string
WORD = re.compile(r"[^\s,:=()\[\]{}\"'<\udc00-\udfff]+")
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
CONSTANTS = {
    "True": "true",
    "False": "false",
    "None": "null",
    "true": "true",
    "false": "false",
    "null": "null",
}
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v", "0": "\0", "\n": ""}
HEX = {"x": 2, "u": 4, "U": 8}
MAX_NUMBER_CHARS = 64


def quoted(text: str) -> str:
    """A JSON string."""
    return json.dumps(text, ensure_ascii=False)


def json_value(source: Source, emit: Emit) -> Reading:
    """Emit the JSON value that is next, as it comes; False if it breaks off.

    Values that are not JSON end at the first character that makes no sense outside a string.
    """
    char = yield from source.solid()
    if char == '"':
        return (yield from _string(source, emit))
    if char not in ("{", "["):
        return (yield from _scalar(source, emit))
    depth = 0
    while True:
        found = OUTSIDE.search(source.text, source.at)
        if found is None:
            if source.at < len(source.text):
                emit(source.take(len(source.text)))
            if not (yield from source.more()):
                return False
            continue
        char = found.group()
        if char == '"':
            if found.start() > source.at:
                emit(source.take(found.start()))
            if not (yield from _string(source, emit)):
                return False
            continue
        if char not in "{}[]":
            if found.start() > source.at:
                emit(source.take(found.start()))
            return False
        emit(source.take(found.end()))
        depth += 1 if char in "{[" else -1
        if depth == 0:
            return True


def _string(source: Source, emit: Emit) -> Reading:
    """Emit a JSON string with its quotes."""
    emit(source.take(source.at + 1))
    while True:
        found = WITHIN.search(source.text, source.at)
        mark = found.group() if found else ""
        end = len(source.text) if found is None else found.end() if mark in '"\\' else found.start()
        if end > source.at:
            emit(source.take(end))
        if found is None:
            if not (yield from source.more()):
                return False
        elif mark != "\\":
            return mark == '"'
        elif (yield from source.peek()):
            emit(source.take(source.at + 1))


def _scalar(source: Source, emit: Emit) -> Reading:
    while True:
        found = WORD.match(source.text, source.at)
        if found is not None:
            emit(source.take(found.end()))
        if source.at < len(source.text) or not (yield from source.more()):
            return not source.ended or source.at < len(source.text)


def json_string(source: Source) -> Generator[None, None, str | None]:
    """The JSON string that is next, read; None if it is none, or breaks off."""
    if (yield from source.solid()) != '"':
        return None
    pieces: list[str] = []
    if not (yield from _string(source, pieces.append)):
        return None
    try:
        found = json.loads("".join(pieces), strict=False)
    except ValueError:
        return None
    return found if isinstance(found, str) else None


def members(source: Source, emit: Emit, close: str, quotes: Sequence[str], *, escapes: bool) -> Reading:
    """Emit `a=1, b: 'x'` up to the bracket that closes them as a JSON object; False if they break off."""
    emit("{")
    closers, word, comma = [close], "", ""
    while closers:
        char = yield from source.solid()
        if not char:
            return False
        if quote := (yield from source.one_of(quotes)):
            text = yield from _quoted_text(source, quote, escapes=escapes)
            if text is None:
                return False
            word, comma = _put(emit, comma + _value(word) + quoted(text))
        elif char in "([{":
            source.take(source.at + 1)
            closers.append({"(": ")", "[": "]", "{": "}"}[char])
            word, comma = _put(emit, comma + _value(word) + ("{" if char == "{" else "["))
        elif char in ")]}":
            source.take(source.at + 1)
            closer = closers.pop() if closers else close
            text = (comma if word else "") + _value(word)  # a comma at the end is none in JSON
            word, comma = _put(emit, text + ("}" if closer == "}" or not closers else "]"))
        elif char in ":=":
            source.take(source.at + 1)
            word, comma = _put(emit, (comma + quoted(word) if word else "") + ": ")
        elif char == ",":
            source.take(source.at + 1)
            word, comma = _put(emit, (comma if word else "") + _value(word))[0], ", "
        elif found := WORD.match(source.text, source.at):
            word += source.take(found.end())
        else:
            return False  # a marker, or what no notation has
    return True


def _put(emit: Emit, text: str) -> tuple[str, str]:
    """Emit; what is left then of word and comma."""
    if text:
        emit(text)
    return "", ""


def _value(word: str) -> str:
    """A value that is no string, as JSON."""
    if not word or NUMBER.fullmatch(word):
        return word
    if word in CONSTANTS:
        return CONSTANTS[word]
    if len(word) <= MAX_NUMBER_CHARS:
        for kind in (lambda text: int(text, 0), float):
            try:
                found = kind(word)
            except ValueError:
                continue
            if found == found and abs(found) != float("inf"):
                return json.dumps(found)
    return quoted(word)


def _quoted_text(source: Source, quote: str, *, escapes: bool) -> Generator[None, None, str | None]:
    """The text up to `quote`; None if that does not come."""
    pieces: list[str] = []
    ends = markers_of((quote, "\\") if escapes else (quote,))
    while (found := (yield from source.until(ends, pieces.append))) == "\\":
        pieces.append((yield from _escape(source)))
    return None if found is None else "".join(pieces)


def _escape(source: Source) -> Generator[None, None, str]:
    """What follows a backslash in Python."""
    if not (yield from source.peek()):
        return "\\"
    kind = source.take(source.at + 1)
    if kind not in HEX:
        return ESCAPES.get(kind, kind if kind in "\\'\"" else "\\" + kind)
    digits = ""
    while len(digits) < HEX[kind] and (yield from source.peek()) in set("0123456789abcdefABCDEF"):
        digits += source.take(source.at + 1)
    code = int(digits, 16) if len(digits) == HEX[kind] else -1
    if not 0 <= code < 0x110000:
        return "\\" + kind + digits
    return "\ufffd" if 0xD800 <= code < 0xE000 else chr(code)
