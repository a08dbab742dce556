"""What a parser finds in an answer, piece by piece or as a whole. Knows no format and no protocol."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import groupby


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """The model calls a tool; calls of an answer are numbered from 0, and do not overlap."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of a call's arguments: pieces that add up to a JSON object, unless the model breaks off or errs."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnds:
    """Nothing more comes of a call."""

    index: int


Event = ReasoningDelta | TextDelta | CallBegins | ArgumentsDelta | CallEnds


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A complete call. `arguments` is JSON, as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class Answer:
    """A complete answer, in the order in which protocols show its parts."""

    reasoning: str = ""
    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)


def merged(events: Iterable[Event]) -> list[Event]:
    """The same, with deltas that follow each other joined."""
    found: list[Event] = []
    for _, group in groupby(events, key=type):
        together = list(group)
        deltas = [event for event in together if not isinstance(event, CallBegins | CallEnds)]
        if len(deltas) > 1:  # of one call: deltas of two never touch
            found.append(replace(deltas[0], text="".join(event.text for event in deltas)))
        else:
            found += together
    return found


def answer(events: Iterable[Event]) -> Answer:
    """All events of an answer, joined."""
    reasoning: list[str] = []
    text: list[str] = []
    begun: list[CallBegins] = []
    arguments: list[list[str]] = []
    for event in events:
        match event:
            case ReasoningDelta():
                reasoning.append(event.text)
            case TextDelta():
                text.append(event.text)
            case CallBegins():
                begun.append(event)
                arguments.append([])
            case ArgumentsDelta():
                arguments[event.index].append(event.text)
    calls = [ToolCall(b.id, b.name, "".join(a)) for b, a in zip(begun, arguments, strict=True)]
    return Answer("".join(reasoning), "".join(text), calls)
