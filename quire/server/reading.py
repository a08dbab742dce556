"""One output of a conversation, read into reasoning, text and calls as it comes. Knows no protocol."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from quire.engine.inputs import InputProcessor
from quire.text.detokenize import Detokenizer
from quire.text.tools.events import Event, TextDelta
from quire.types import CallRules, CompletionOutput, Request


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What of a request its answers' reading depends on.

    Attributes:
        tools: those that the model was told of, in OpenAI's format.
        continued: the end of the prompt, where the answer goes on with a message.
        calls: what may be called; None: nothing, or whatever the model calls.
        most_calls: further calls are left out.
    """

    prompt: str
    tools: Sequence[Mapping[str, Any]] = ()
    continued: str = ""
    calls: CallRules | None = None
    most_calls: int | None = None


class Reading:
    """One output; where the model's formats are not known all of it is text."""

    def __init__(self, inputs: InputProcessor, asked: Conversation, request: Request, seed: str):
        self.parser = self.lengths = None
        self.reasons = inputs.dialect.reasoning is not None
        self.ends: list[int] = []  # of the tokens, in characters
        skips, marks = request.params.skip_special_tokens, request.marks
        if inputs.dialect and inputs.tokenizer is not None:
            self.parser = inputs.dialect.parser(
                prompt=asked.prompt,
                continued=asked.continued,
                tools=asked.tools,
                seed=seed,
                most_calls=asked.most_calls,
                show_special=not skips,
            )
            self.lengths = Detokenizer(
                inputs.tokenizer, request.prompt_token_ids, skip_special_tokens=skips, marks=marks
            )

    @property
    def knows_reasoning(self) -> bool:
        """Reasoning can be told from text."""
        return self.parser is not None and self.reasons

    def take(self, new: CompletionOutput) -> list[Event]:
        """The events that come of what is new; of the last output, all that are left."""
        if self.parser is None or self.lengths is None:
            return [TextDelta(new.text)] if new.text else []
        begin = self.ends[-1] if self.ends else 0
        each: Iterator[int] = (len(self.lengths.push((token,))) for token in new.token_ids)
        self.ends += list(accumulate(each, initial=begin))[1:]
        events = self.parser.feed(new.text) if new.text else []
        return events if new.finish_reason is None else [*events, *self.parser.finish()]

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens so far that are reasoning, its closing marker included."""
        spans = self.parser.spans if self.parser is not None else ()
        return sum(bisect_right(self.ends, end) - bisect_right(self.ends, begin) for begin, end in spans)

    def finish_reason(self, reason: str | None) -> str | None:
        """Why it ended, as far as the engine's `reason` is not the whole answer: to call tools."""
        return "tool_calls" if reason == "stop" and self.parser and self.parser.num_calls else reason
