"""POST /v1/chat/completions: a conversation, answered with reasoning, text and calls of tools."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from quire.engine.inputs import InputProcessor
from quire.server.call import Call, run_call
from quire.server.conversation import begin, call_rules, effort_names, no_such_tool, readable, render
from quire.server.errors import bad_request
from quire.server.frontend import Frontend, Numbered
from quire.server.openai.logprobs import LogprobWriter
from quire.server.openai.params import chat_params, check_n, ending, envelope, failed, prompt_scores, usage
from quire.server.openai.protocol import ChatRequest, TokenizeRequest
from quire.server.reading import Conversation, Reading
from quire.server.schema import body_of
from quire.server.sse import DONE, Chunks
from quire.text.tools.events import (
    Answer,
    ArgumentsDelta,
    CallBegins,
    Event,
    ReasoningDelta,
    TextDelta,
    answer,
)
from quire.types import CompletionOutput, Request, RequestOutput

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest))
async def create_chat_completion(http: HttpRequest) -> Response:
    """Answer a conversation."""
    return await run_call(http, ChatRequest, "chatcmpl-", _prepare)


def prompt_of(
    ask: ChatRequest | TokenizeRequest, front: Frontend, tools: list[dict[str, Any]] | None, **names: Any
) -> str:
    """The prompt of a conversation. `names` are the template's, unless the request has them too.

    Raises:
        ApiError, InvalidRequest: the template refuses it, or a name is not the template's to take.
    """
    opens = not ask.continue_final_message if ask.add_generation_prompt is None else ask.add_generation_prompt
    return render(
        front,
        ask.messages or (),
        tools=tools,
        names=names,
        kwargs=ask.chat_template_kwargs,
        begin=opens,
        continues=ask.continue_final_message,
    )


def _prepare(front: Frontend, call: Call, ask: ChatRequest) -> "tuple[Writer, list[Request]]":
    check_n(ask, front.settings.max_n)
    if ask.top_logprobs and not ask.logprobs:
        raise bad_request("top_logprobs is set, and logprobs is not; set logprobs to true", "top_logprobs")
    if not ask.include_reasoning and (ask.logprobs or ask.return_token_ids):
        raise bad_request(
            "include_reasoning is off, and logprobs or return_token_ids would show the reasoning; leave one out",
            "include_reasoning",
        )
    inputs = front.service.inputs
    tools = _tools(ask, inputs, call.warnings)
    params = chat_params(ask, inputs.defaults)
    names = effort_names(ask.reasoning_effort)
    if ask.documents is not None:
        names["documents"] = ask.documents
    prompt = prompt_of(ask, front, tools, **names)
    last = ask.messages[-1].get("content") if ask.continue_final_message else ""
    asked = Conversation(
        prompt=prompt,
        tools=tools or (),
        continued=last if isinstance(last, str) else "",
        calls=call_rules(tools, ask.tool_choice, single=not ask.parallel_tool_calls),
        most_calls=None if ask.parallel_tool_calls else 1,
    )
    readings, requests = begin(front, call, asked, ask, params, add_special_tokens=ask.add_special_tokens)
    as_ids = ask.return_tokens_as_token_ids
    return Writer(call, ask, LogprobWriter(inputs.tokenizer, as_ids=as_ids), readings), requests


def _tools(ask: ChatRequest, inputs: InputProcessor, warnings: list[str]) -> list[dict[str, Any]] | None:
    """Those that the model is told of; what is no function is left out with a warning.

    Raises:
        ApiError: calls could not be read.
    """
    tools = []
    for tool in ask.tools or ():
        if tool.get("type", "function") == "function":
            tools.append(tool)
        else:
            warnings.append(no_such_tool(tool["type"]))
    return None if ask.tool_choice == "none" else readable(tools, inputs)


class Writer:
    """Writes the outputs of one call, as one body or as chunks."""

    end, goes_on, failed = DONE, True, staticmethod(failed)

    def __init__(self, call: Call, ask: ChatRequest, logprobs: LogprobWriter, readings: list[Reading]):
        self.call, self.ask, self.logprobs, self.readings = call, ask, logprobs, readings
        self.plain = not ask.logprobs and not ask.return_token_ids
        self.num_generated = 0
        self.ended: set[int] = set()
        last = ask.messages[-1] if ask.messages else {}
        own = ask.echo and last.get("role") == "assistant" and isinstance(last.get("content"), str)
        self.echo = last["content"] if own else ""

    @property
    def num_reasoning(self) -> int | None:
        """Tokens of reasoning, of all choices; None where that cannot be told from text."""
        known = [reading for reading in self.readings if reading.knows_reasoning]
        return sum(reading.num_reasoning_tokens for reading in known) if known else None

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The body of an answer in one piece."""
        (output,) = outputs
        choices = []
        for new in output.outputs:
            self.num_generated += len(new.token_ids)
            message = self._message(answer(self.readings[new.index].take(new)))
            choices.append({"index": new.index, "message": message, **self._rest(new)})
        body = {**envelope(self.call, "chat.completion"), "choices": choices}
        body["usage"] = usage(outputs, self.num_generated, self.num_reasoning)
        if self.ask.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_scores(output)
        if self.ask.return_token_ids:
            body["prompt_token_ids"] = output.prompt_token_ids
        return self.call.noted(body)

    def _message(self, found: Answer) -> dict[str, Any]:
        content = self.echo + found.text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if not content and (found.calls or found.reasoning):
            message["content"] = None
        if found.reasoning and self.ask.include_reasoning:
            message |= _reasoning(found.reasoning)
        if found.calls:
            message["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in found.calls
            ]
        return message

    async def stream(self, outputs: AsyncGenerator[Numbered, None]) -> AsyncGenerator[bytes, None]:
        """Chunks of what is new in each output; the role comes first."""
        at_end, always = self.ask.usage_in_stream
        chunks, latest = (
            Chunks(envelope(self.call, "chat.completion.chunk"), usage=at_end),
            self.call.timing.latest,
        )
        async with aclosing(outputs):
            async for _, output in outputs:
                pieces = []
                if not latest:
                    pieces += self._opening(output, at_end, usage([output], 0) if always else None)
                latest[0] = output
                for new in output.outputs:
                    if new.index not in self.ended and (new.token_ids or new.text or new.finish_reason):
                        self.num_generated += len(new.token_ids)
                        so_far = usage([output], self.num_generated) if always else None
                        pieces += self._news(new, chunks, so_far)
                if pieces:
                    yield b"".join(pieces)
        if last := ending(self.call, self.ask, self.num_generated, self.num_reasoning):
            yield chunks.end(last)

    def _news(self, new: CompletionOutput, chunks: Chunks, so_far: dict[str, Any] | None) -> list[bytes]:
        """Chunks of one choice: a delta each; the last one has what else there is to say."""
        events = self.readings[new.index].take(new)
        deltas = [delta for event in events if (delta := self._delta(event))]
        last: dict[str, Any] | None = None
        if new.finish_reason is not None or not self.plain or so_far is not None:
            last = deltas.pop() if deltas else {"content": ""}
        pieces = []
        for delta in deltas:
            if (text := delta.get("content")) is not None and so_far is None:
                pieces.append(chunks.text(new.index, text, _text_choice))
            else:
                pieces.append(chunks.choice({"index": new.index, **_choice(delta)}, so_far))
        if new.finish_reason is not None:
            self.ended.add(new.index)
        if last is not None:
            pieces.append(chunks.choice({"index": new.index, "delta": last, **self._rest(new)}, so_far))
        return pieces

    def _delta(self, event: Event) -> dict[str, Any] | None:
        """None for what is not told."""
        match event:
            case TextDelta(text):
                return {"content": text}
            case ReasoningDelta(text):
                return _reasoning(text) if self.ask.include_reasoning else None
            case CallBegins(index, id_, name):
                function = {"name": name, "arguments": ""}
                return {"tool_calls": [{"index": index, "id": id_, "type": "function", "function": function}]}
            case ArgumentsDelta(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        return None

    def _opening(self, output: RequestOutput, at_end: bool, so_far: dict[str, Any] | None) -> list[bytes]:
        plain = envelope(self.call, "chat.completion.chunk")
        noted = self.call.noted(plain)
        if self.ask.return_token_ids:
            noted["prompt_token_ids"] = output.prompt_token_ids
        first, later = Chunks(noted, usage=at_end), Chunks(plain, usage=at_end)
        delta = {"role": "assistant", "content": self.echo}
        return [
            (later if new.index else first).choice({"index": new.index, **_choice(delta)}, so_far)
            for new in output.outputs
        ]

    def _rest(self, new: CompletionOutput) -> dict[str, Any]:
        """What a choice has besides its text."""
        rest: dict[str, Any] = {
            "logprobs": None,
            "finish_reason": self._finish_reason(new),
            "stop_reason": new.stop_reason,
        }
        if self.ask.logprobs:
            rows, num_top = new.logprobs or [], self.ask.top_logprobs or 0
            rest["logprobs"] = self.logprobs.objects(rows, new.token_ids, num_top)
        if self.ask.return_token_ids:
            rest["token_ids"] = new.token_ids
        return rest

    def _finish_reason(self, new: CompletionOutput) -> str | None:
        """As OpenAI says it: a call of the one function that the request names is no reason."""
        choice = self.ask.tool_choice
        named = isinstance(choice, dict) and choice.get("type") == "function"
        return new.finish_reason if named else self.readings[new.index].finish_reason(new.finish_reason)


def _reasoning(text: str) -> dict[str, Any]:
    return {"reasoning": text, "reasoning_content": text}


def _choice(delta: dict[str, Any]) -> dict[str, Any]:
    return {"delta": delta, "logprobs": None, "finish_reason": None}


def _text_choice(text: str) -> dict[str, Any]:
    return _choice({"content": text})
