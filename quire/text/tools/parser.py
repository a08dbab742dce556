"""Reads an answer as the model writes it, by the states of a format. The same for streams and for whole answers.

Never fails: what is no proper call is text, and what breaks off within a call ends it. Takes time in proportion to the
text, however it is split, and the split makes no difference.
"""

import hashlib
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from quire.text.tools.events import (
    ArgumentsDelta,
    CallBegins,
    CallEnds,
    Event,
    ReasoningDelta,
    TextDelta,
    merged,
)
from quire.text.tools.format import CALL_ROLES, Role, State
from quire.text.tools.json_calls import arguments, json_calls
from quire.text.tools.notation import members, quoted
from quire.text.tools.source import Markers, Source, markers_of
from quire.text.tools.values import Parameters, as_json, is_string, parameters_of

MAX_NAME_CHARS = 256  # of a call's name and of a header; longer ones are text
MARKS = re.compile("[\udc00-\udfff]")
NO_CALL = ""  # instead of a state: what was read is text

Reading = Generator[None, None, str | None]


class Parser:
    """One answer.

    Args:
        states: see `quire.text.tools.format`.
        start: name of the state in which the answer begins.
        tools: in OpenAI's format.
        ids: makes a call's id from its number.
        most_calls: further calls are left out.
        unmark: characters that stand for special tokens -> what to show where they are no markers.
    """

    def __init__(
        self,
        states: Mapping[str, State],
        *,
        start: str = "start",
        tools: Sequence[Mapping[str, Any]] = (),
        ids: Callable[[int], str] | None = None,
        most_calls: int | None = None,
        unmark: Mapping[str, str] | None = None,
    ):
        self._states = states
        self._parameters: Parameters = parameters_of(tools)
        self._ids, self._most, self._unmark = ids or call_ids("", 0), most_calls, unmark or {}
        self._source, self._trim, self._call = Source(), _Trim(), _Call()
        self._events: list[Event] = []
        self.state = ""  # name of the one it is in
        self.spans: list[tuple[int, int]] = []  # of characters that were fed: reasoning
        self._run = self._states_in_turn(start if start in states else "text")
        next(self._run, None)

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        return self._call.index + 1

    def feed(self, text: str) -> list[Event]:
        """What can be told now that `text` has come."""
        self._source.push(text)
        next(self._run, None)
        return self._told()

    def finish(self) -> list[Event]:
        """What is left to tell when nothing more comes."""
        self._source.ended = True
        for _ in self._run:
            pass
        return self._told()

    def begin(self, name: str, given: str | None = None, *, known: bool = False) -> bool:
        """A call begins; False if it must be of a known tool and is not."""
        name = self._clean(name)
        if not name or (known and name not in self._parameters):
            return False
        self.end()
        self._source.kept = None
        self._trim.drop()
        silent = self._most is not None and self.num_calls >= self._most
        index = self._call.index + (not silent)
        self._call = _Call(index, name, is_open=True, is_silent=silent)
        if not silent:
            self._events.append(CallBegins(index, given or self._ids(index), name))
        return True

    def argue(self, text: str) -> None:
        """More of the call's arguments."""
        text = self._clean(text)
        if text and not self._call.is_silent:
            self._call.num_pieces += 1
            self._events.append(ArgumentsDelta(self._call.index, text))

    def end(self, *, broken: bool = False) -> None:
        """The open call ends, if there is one; a `broken` one as it is."""
        call = self._call
        if not call.is_open:
            return
        if not broken and not call.num_pieces:
            self.argue("{}")
        elif not broken and call.has_members:
            self.argue("}")
        call.is_open = False
        if not call.is_silent:
            self._events.append(CallEnds(call.index))

    def _told(self) -> list[Event]:
        events, self._events = self._events, []
        return merged(events) if len(events) > 1 else events

    def _states_in_turn(self, start: str) -> Generator[None, None, None]:
        following: str | None = start
        state = self._states[start]
        while following is not None:
            self.state, state = following, self._states[following]
            if state.role not in IN_CALL:
                self.end()
            following = yield from self._READERS[state.role](self, state)
            if following == NO_CALL:
                self._trim.undo(self._source.kept)
                self._say("".join(self._source.kept or ()))
                self._source.kept = None
                following = "text"
        self.end(broken=state.role in (Role.KEY, Role.VALUE, Role.STRING))
        if state.role is not Role.REASONING:
            self._show(self._trim.rest(), TextDelta)

    def _enter(self, state: State, marker: str, before: str = "") -> str:
        """Leave ordinary text by a marker."""
        then = state.on[marker]
        space = self._trim.drop()
        self._source.kept = [before, space, marker] if self._states[then].role in CALL_ROLES else None
        return then

    def _start(self, state: State) -> Reading:
        self._source.kept = []
        yield from self._source.solid()
        marker = yield from self._source.one_of(tuple(state.on))
        space, self._source.kept = "".join(self._source.kept[:-1]), None
        if marker:
            return self._enter(state, marker, space)
        self._say(space)
        return "text"

    def _text(self, state: State) -> Reading:
        marker = yield from self._source.until(_markers(state), self._say)
        return None if marker is None else self._enter(state, marker)

    def _reasoning(self, state: State) -> Reading:
        begin = self._source.num_taken
        self._trim.drop()
        self.spans.append((begin, 1 << 62))
        marker = yield from self._source.until(_markers(state), self._think)
        self.spans[-1] = (begin, self._source.num_taken)
        return None if marker is None else self._enter(state, marker)

    def _gap(self, state: State) -> Reading:
        if self._source.kept is None:
            marker = yield from self._source.until(_markers(state), _drop)
            return _after(state, marker)
        yield from self._source.solid()
        marker = yield from self._source.one_of(tuple(state.on))
        return state.on[marker] if marker else NO_CALL

    def _skip(self, state: State) -> Reading:
        marker = yield from self._source.until(_markers(state), _drop, MAX_NAME_CHARS)
        return NO_CALL if marker is None else state.on[marker]

    def _name(self, state: State) -> Reading:
        pieces: list[str] = []
        marker = yield from self._source.until(_markers(state), pieces.append, MAX_NAME_CHARS)
        text = "".join(pieces).strip()
        if marker is None:
            return NO_CALL
        then = state.on[marker]
        if not text and (self._source.kept is None or self._states[then].role is Role.CALLS):
            return then  # an empty list, or calls of another form
        found = re.fullmatch(state.pattern, text)
        if found is None or not self.begin(found["name"], found.groupdict().get("id"), known=state.known):
            return NO_CALL
        return then

    def _header(self, state: State) -> Reading:
        pieces: list[str] = []
        marker = yield from self._source.until(_markers(state), pieces.append, MAX_NAME_CHARS)
        header = "".join(pieces)
        if marker is None and self._source.ended:
            return None
        if marker is None:
            self._say(header)
            return "text"
        self._trim.drop()
        for pattern, then in state.choices:
            found = re.search(pattern, header)
            if found and (self._states[then].role is not Role.ARGUMENTS or self.begin(found["name"])):
                return then
        return state.on[marker]

    def _key(self, state: State) -> Reading:
        pieces: list[str] = []
        marker = yield from self._source.until(_markers(state), pieces.append)
        self._call.key = "".join(pieces).strip()
        return _after(state, marker)

    def _value(self, state: State) -> Reading:
        types = self._parameters.get(self._call.name, {}).get(self._call.key)
        self.argue(("," if self._call.has_members else "{") + quoted(self._clean(self._call.key)) + ":")
        self._call.has_members = True
        value = _Lines()
        if state.role is Role.STRING or is_string(types):
            self.argue('"')
            marker = yield from self._source.until(
                _markers(state), lambda text: self.argue(_escaped(self._clean(value.inner(text))))
            )
            if marker is not None:
                self.argue('"')
            return _after(state, marker)
        pieces: list[str] = []
        marker = yield from self._source.until(_markers(state), lambda text: pieces.append(value.inner(text)))
        if marker is not None:
            self.argue(as_json(self._clean("".join(pieces)), types))
        return _after(state, marker)

    def _calls(self, state: State) -> Reading:
        begin = partial(self.begin, known=state.known)
        begun = yield from json_calls(self._source, state.opened, begin, self.argue, self.end)
        return state.on[""] if begun else NO_CALL

    def _arguments(self, state: State) -> Reading:
        yield from arguments(self._source, self.argue)
        return state.on[""]

    def _members(self, state: State) -> Reading:
        yield from members(self._source, self.argue, state.close, state.quotes, escapes=state.escapes)
        return state.on[""]

    def _say(self, text: str) -> None:
        self._show(self._trim.inner(self._clean(text)), TextDelta)

    def _think(self, text: str) -> None:
        self._show(self._trim.inner(self._clean(text)), ReasoningDelta)

    def _show(self, text: str, kind: type[TextDelta] | type[ReasoningDelta]) -> None:
        if text:
            self._events.append(kind(text))

    def _clean(self, text: str) -> str:
        return text if text.isascii() else MARKS.sub(lambda mark: self._unmark.get(mark[0], ""), text)

    _READERS: ClassVar[Mapping[Role, Callable[["Parser", State], Reading]]] = {
        Role.START: _start,
        Role.TEXT: _text,
        Role.REASONING: _reasoning,
        Role.GAP: _gap,
        Role.SKIP: _skip,
        Role.NAME: _name,
        Role.HEADER: _header,
        Role.PARAMETERS: _gap,
        Role.KEY: _key,
        Role.VALUE: _value,
        Role.STRING: _value,
        Role.CALLS: _calls,
        Role.ARGUMENTS: _arguments,
        Role.MEMBERS: _members,
    }


IN_CALL = {Role.PARAMETERS, Role.KEY, Role.VALUE, Role.STRING, Role.ARGUMENTS, Role.MEMBERS}


@dataclass(slots=True)
class _Call:
    """The newest call; its index is -1 before there is one."""

    index: int = -1
    name: str = ""
    is_open: bool = False
    is_silent: bool = False
    has_members: bool = False  # it has parameters of its own, between braces that the parser writes
    num_pieces: int = 0
    key: str = ""


@dataclass(slots=True)
class _Trim:
    """Leaves out white space next to markers; elsewhere it comes with the text after it."""

    at_marker: bool = False
    before: bool = False  # as `at_marker`, at the marker before
    space: list[str] = field(default_factory=list)

    def inner(self, text: str) -> str:
        if self.at_marker:
            text = text.lstrip()
        bare = text.rstrip()
        if not bare:
            self.space += [text] if text else []
            return ""
        self.at_marker = False
        held, self.space = self.space, [text[len(bare) :]]
        return "".join(held) + bare

    def drop(self) -> str:
        """At a marker: the white space before it."""
        self.before, self.at_marker = self.at_marker, True
        return self.rest()

    def undo(self, kept: list[str] | None) -> None:
        """What was `kept` since the last marker is text, and so is that."""
        if kept is not None:
            self.at_marker = self.before

    def rest(self) -> str:
        held, self.space = self.space, []
        return "".join(held)


@dataclass(slots=True)
class _Lines:
    """Leaves out one line break at the beginning of a value and one at its end."""

    begun: bool = False
    held: str = ""

    def inner(self, text: str) -> str:
        if not self.begun and text.startswith("\n"):
            text = text[1:]
        self.begun = True
        text = self.held + text
        self.held = "\n" if text.endswith("\n") else ""
        return text.removesuffix("\n")


def call_ids(seed: str, num_chars: int) -> Callable[[int], str]:
    """Ids of an answer's calls: the same when the answer is read again. `num_chars`: of formats that want so many."""

    def made(index: int) -> str:
        digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=16).hexdigest()
        return digest[:num_chars] if num_chars else f"call_{digest[:24]}"

    return made


def _after(state: State, marker: str | None) -> str | None:
    return None if marker is None else state.on[marker]


def _markers(state: State) -> Markers:
    return markers_of(tuple(marker for marker in state.on if marker))


def _escaped(text: str) -> str:
    return quoted(text)[1:-1]


def _drop(_: str) -> None:
    pass
