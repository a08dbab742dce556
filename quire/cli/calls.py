"""One timed request in the form of OpenAI's API. Knows no load, no figures and no sockets."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from quire.cli.client import MAX_ERROR_BYTES, Client, ConnectionFailed, error_text, message_in, refusal
from quire.cli.report import Timed
from quire.cli.sse import Events

OK = 200
END = b"[DONE]"


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: Any = None


class Choice(msgspec.Struct):
    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Chunk(msgspec.Struct):
    """What is read of an event of either API; the rest is skipped, not parsed into objects."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, its tokens, and how many to ask for."""

    prompt: str
    input_len: int
    output_len: int


@dataclass(frozen=True, kw_only=True)
class Api:
    """Where and how to ask.

    Attributes:
        extra: fields of the body beside those that the benchmark sets; they win.
    """

    chat: bool
    path: str
    model: str
    ignore_eos: bool
    extra: Mapping[str, Any]

    def body(self, question: Question) -> bytes:
        fields: dict[str, Any] = {"model": self.model}
        if self.chat:
            fields["messages"] = [{"role": "user", "content": question.prompt}]
            fields["max_completion_tokens"] = question.output_len
        else:
            fields["prompt"] = question.prompt
            fields["max_tokens"] = question.output_len
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.ignore_eos:
            fields["ignore_eos"] = True
        return msgspec.json.encode(fields | dict(self.extra))


class Answer:
    """Reads a streamed answer piece by piece into `timed`."""

    def __init__(self, timed: Timed, *, keep_text: bool):
        self.timed = timed
        self.beginning = b""  # for the message, should the status be an error
        self.ended = False
        self.counted = False
        self._keep_text = keep_text
        self._events = Events()

    def take(self, piece: bytes, now: float) -> None:
        if len(self.beginning) < MAX_ERROR_BYTES:
            self.beginning += piece
        for event in self._events.feed(piece):
            if event == END:
                self.ended = True
            else:
                self._read(event, now)

    def _read(self, event: bytes, now: float) -> None:
        timed = self.timed
        try:
            chunk = _decode(event)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            timed.error = timed.error or f"an event is not in OpenAI's form: {error}"
            return
        if chunk.error is not None:
            timed.error = timed.error or f"in the stream: {message_in(chunk.error)}"
        if chunk.usage is not None:
            self.counted = True
            timed.input_len = chunk.usage.prompt_tokens or timed.input_len
            timed.output_len = chunk.usage.completion_tokens or 0
        for choice in chunk.choices:
            self._choice(choice, now)

    def _choice(self, choice: Choice, now: float) -> None:
        timed, delta = self.timed, choice.delta
        text = choice.text or (delta and (delta.content or delta.reasoning or delta.reasoning_content)) or ""
        # The first chunk of a chat says only who speaks, the last only why the text ends: neither is output,
        # unless there is no text at all.
        if text or (delta and delta.tool_calls) or (choice.finish_reason and not timed.times):
            timed.times.append(now)
        if choice.finish_reason:
            self.ended = True
        if text and self._keep_text:
            timed.texts.append(text)


_decode: Callable[[bytes], Chunk] = msgspec.json.Decoder(Chunk).decode


async def call(
    client: Client, api: Api, question: Question, *, due: float = 0.0, keep_text: bool = False
) -> Timed:
    """Ask, and time the answer. A failure is not raised; it is in the result's `error`."""
    timed = Timed(input_len=question.input_len)
    answer = Answer(timed, keep_text=keep_text)
    body = api.body(question)
    timed.start = time.perf_counter()
    timed.due = min(due, timed.start) if due else timed.start
    try:
        timed.status, timed.retry_after = await client.send(api.path, body, answer.take)
    except ConnectionFailed as error:
        timed.error = timed.error or str(error)
        return timed
    if timed.status != OK:
        timed.error = refusal(timed.status, answer.beginning)
    elif not timed.error and not (answer.ended and timed.times):
        timed.error = f"the answer is no stream of events, or was cut: {error_text(answer.beginning)}"
    if not answer.counted:
        timed.output_len = len(timed.times)
    return timed
