"""How a family of models writes reasoning and calls, as data: states, and the markers that lead from one to another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

NAME = r"(?P<name>[^\s\"'<>{}()\[\],=\udc00-\udfff]+)"

ASSISTANT = "<|start|>assistant"  # begins messages where reasoning is one of its own


class Role(Enum):
    """What the text in a state is.

    The states of a call end with JSON or by a marker; text between markers that has no meaning is dropped.
    """

    START = "white space before the answer; anything else is text"
    TEXT = "text of the answer"
    REASONING = "reasoning"
    GAP = "between calls; before the first one only white space may stand there"
    SKIP = "something about a call that nobody needs"
    NAME = "the name of a tool, which begins a call"
    HEADER = "says what follows: see State.choices"
    PARAMETERS = "between the parameters of a call"
    KEY = "the name of a parameter"
    VALUE = "a parameter's value, of the type that the tool's schema says"
    STRING = "a parameter's value, which is a string"
    CALLS = "calls as JSON: an object with name and arguments, or a list of them"
    ARGUMENTS = "arguments as JSON"
    MEMBERS = "arguments in a programming language's notation, after the bracket that opens them"


@dataclass(frozen=True)
class State:
    """One state.

    Attributes:
        on: marker -> name of the next state. "" is for roles that end by themselves.
        pattern: of NAME: what a name looks like; the groups are `name`, and `id` where the model gives one.
        choices: of HEADER: (pattern, next state), the first that is found in the header; a group `name` begins a call.
        close: of MEMBERS: the bracket that ends them.
        quotes: of MEMBERS: what strings stand between, longest first.
        escapes: of MEMBERS: a backslash in a string begins an escape, as in Python.
        opened: of CALLS: the marker before it is the bracket that opens them.
        known: of roles that begin calls: names of tools that the request does not have are no calls.
        writes: what models write there, before a marker or as a name; of HEADER: in whole, at the head of a call.
            {name} stands for the tool's, {number} for any number. Nothing else is said where calls are constrained.
        thinks: of HEADER: what may come before the first call even where one must come.
        keys: of CALLS: an object's members in the order in which models write them; name and arguments must be there.
        listed: of CALLS: objects stand in a list.
        between: of CALLS that are not listed: what stands between objects; "": there is one.
    """

    role: Role
    on: Mapping[str, str] = field(default_factory=dict)
    pattern: str = NAME
    choices: Sequence[Sequence[str]] = ()
    close: str = ")"
    quotes: Sequence[str] = ('"""', "'''", '"', "'")
    escapes: bool = True
    opened: str = ""
    known: bool = False
    writes: Sequence[str] = ()
    thinks: str = ""
    keys: Sequence[str] = ("name", "arguments")
    listed: bool = False
    between: str = ""


@dataclass(frozen=True, kw_only=True)
class Format:
    """How calls are written.

    Attributes:
        names: what the format is called: first by us, then by vLLM where that differs.
        signs: strings of chat templates; the format is recognized where all strings of one tuple occur.
        order: templates are searched for signs of formats with lower numbers first.
        states: name -> state. "text" is where an answer begins, or "start" where there is such a state.
        id_chars: of calls' ids; 0: the usual ones.
        reasons: its states include reasoning, and headers without which text cannot be read.
    """

    names: Sequence[str]
    signs: Sequence[Sequence[str]]
    states: Mapping[str, State]
    order: int = 0
    id_chars: int = 0
    reasons: bool = False


@dataclass(frozen=True, kw_only=True)
class Reasoning:
    """How reasoning is written: between two markers, before the answer.

    Attributes:
        names, signs, order: as a Format's.
        dropped: markers around the answer, which are no text.
        closing: what the model writes around `close` when it comes to an end; "": nothing but that.
    """

    names: Sequence[str]
    signs: Sequence[Sequence[str]]
    open: str
    close: str
    dropped: Sequence[str] = ()
    closing: str = ""
    order: int = 0


PLAIN: Mapping[str, State] = {"text": State(Role.TEXT)}
CALL_ROLES = set(Role) - {Role.START, Role.TEXT, Role.REASONING, Role.HEADER}


def combined(tools: Format | None, reasoning: Reasoning | Format | None) -> dict[str, State]:
    """The states of answers that have both."""
    if isinstance(reasoning, Format):  # its states are all there is
        return dict(reasoning.states if tools is reasoning else without_calls(reasoning.states))
    states = dict(tools.states if tools is not None else PLAIN)
    if reasoning is None:
        return states
    text = states["text"]
    states["text"] = replace(text, on={**text.on, **dict.fromkeys(reasoning.dropped, "text")})
    start = states.get("start", State(Role.START))
    after = "answer" if "start" in states else "text"
    if "start" in states:
        states["answer"] = start
    states["start"] = replace(start, on={**start.on, reasoning.open: "reasoning"})
    states["reasoning"] = State(Role.REASONING, {reasoning.close: after})
    return states


def without_calls(states: Mapping[str, State]) -> dict[str, State]:
    """The same, for answers that may call nothing: calls are text like any other."""
    kept = {name: state for name, state in states.items() if state.role not in CALL_ROLES}
    return {
        name: replace(
            state,
            on={marker: then for marker, then in state.on.items() if then in kept},
            choices=[(p, then if then in kept else "text") for p, then in state.choices],
        )
        for name, state in kept.items()
    }
