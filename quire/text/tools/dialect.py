"""How one model's answers are read: its formats, and which of their markers are special tokens. Knows no request."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from quire.text.tools.format import ASSISTANT, Format, Reasoning, Role, State, combined, without_calls
from quire.text.tools.parser import Parser, call_ids
from quire.types import Thoughts

FIRST_MARK = 0xDC00  # characters that no text holds: halves of surrogate pairs
MAX_MARKS = 0x400
# Where reasoning is a channel of its own: what begins it, what ends a message, and what begins the text.
ANALYSIS, END = "<|channel|>analysis<|message|>", "<|end|>"
FINAL = "<|channel|>final<|message|>"


class Vocabulary(Protocol):
    """A tokenizer, as far as special tokens go."""

    @property
    def special_ids(self) -> frozenset[int]: ...

    def token(self, index: int) -> str: ...


class Dialect:
    """The formats of a model's calls and reasoning.

    Attributes:
        tools, reasoning: None where there is none, or none that is known.
        marks: special tokens that are part of a marker -> the character that stands for each in text for `parser`.
    """

    def __init__(
        self, tools: Format | None, reasoning: Format | Reasoning | None, vocabulary: Vocabulary | None
    ):
        if tools is not None and tools.reasons:
            reasoning = tools
        self.tools, self.reasoning = tools, reasoning
        self._states = combined(tools, reasoning)
        markers = {marker for state in self._states.values() for marker in (*state.on, *state.quotes)}
        ids = () if vocabulary is None else sorted(vocabulary.special_ids)
        names = {index: vocabulary.token(index) for index in ids} if vocabulary is not None else {}
        used = [i for i in ids if names[i] and any(names[i] in marker for marker in markers)][:MAX_MARKS]
        self.marks: Mapping[int, str] = {index: chr(FIRST_MARK + n) for n, index in enumerate(used)}
        self._texts = {mark: names[index] for index, mark in self.marks.items()}
        self._marked = {name: self._with_marks(state) for name, state in self._states.items()}

    def __bool__(self) -> bool:
        """Whether there is anything to read but text."""
        return self.tools is not None or self.reasoning is not None

    def __str__(self) -> str:
        names = (each.names[0] if each else "none" for each in (self.tools, self.reasoning))
        return "tool calls as {}, reasoning as {}".format(*names)

    def parser(
        self,
        *,
        prompt: str = "",
        continued: str = "",
        tools: Sequence[Mapping[str, Any]] = (),
        seed: str = "",
        most_calls: int | None = None,
        show_special: bool = False,
    ) -> Parser:
        """Reads the answer to `prompt`, which ends with `continued` where the answer goes on with a message.

        Without tools there are no calls, and what looks like one is text. `seed` makes ids of calls.
        """
        return Parser(
            self._marked if tools else without_calls(self._marked),
            start=self.start(prompt, continued),
            tools=tools,
            ids=call_ids(seed, self.tools.id_chars if self.tools else 0),
            most_calls=most_calls,
            unmark=self._texts if show_special else None,
        )

    def start(self, prompt: str, continued: str = "") -> str:
        """The state in which a prompt leaves the answer: most templates open reasoning, some close it at once."""
        if isinstance(self.reasoning, Format):
            _, found, head = prompt.rpartition(ASSISTANT)
            parser = Parser(self._states)
            parser.feed(head if found else "")
            return parser.state
        if self.reasoning is not None:
            mark, close = self.reasoning.open.strip(), self.reasoning.close
            if prompt.rstrip().endswith(mark) or continued.rfind(mark) > continued.rfind(close):
                return "reasoning"
        return "text" if continued.strip() else "start"

    def thoughts(self, prompt: str, continued: str = "") -> Thoughts | None:
        """The reasoning that an answer may begin with; None if it may not, or not as far as is known."""
        state = self.start(prompt, continued)
        if isinstance(self.reasoning, Format):
            return None if self._states[state].role is Role.TEXT else Thoughts("", FINAL, begun=True)
        if self.reasoning is None or state == "text":
            return None
        return Thoughts(self.reasoning.open, self.reasoning.close, begun=state == "reasoning")

    def bounds(self, prompt: str, continued: str = "") -> tuple[Thoughts, str] | None:
        """The reasoning that a budget counts, and what closes it: text with special tokens. None as of `thoughts`."""
        if (thoughts := self.thoughts(prompt, continued)) is None:
            return None
        if isinstance(self.reasoning, Reasoning):
            return thoughts, self.reasoning.closing or self.reasoning.close
        begun = self._states[self.start(prompt, continued)].role is Role.REASONING
        return Thoughts(ANALYSIS, END, begun, again=True), f"{END}<|start|>assistant{FINAL}"

    def _with_marks(self, state: State) -> State:
        """Special tokens are one character each. While the model thinks, those that begin calls are markers too."""
        on = {self._marked_text(marker): then for marker, then in state.on.items()}
        if state.role is Role.REASONING and not isinstance(self.reasoning, Format):
            calls = {self._marked_text(m): then for m, then in self._states["text"].on.items()}
            on = {**{m: then for m, then in calls.items() if m in self._texts}, **on}
        return replace(state, on=on, quotes=[*map(self._marked_text, state.quotes)])

    def _marked_text(self, marker: str) -> str:
        for mark, text in self._texts.items():
            marker = marker.replace(text, mark)
        return marker
