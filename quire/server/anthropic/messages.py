"""POST /v1/messages and /v1/messages/count_tokens: a conversation in Anthropic's form."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from quire.server.anthropic.blocks import Blocks, conversation, functions
from quire.server.anthropic.protocol import CountTokensRequest, MessagesRequest
from quire.server.asking import MOST
from quire.server.call import Call, run_call
from quire.server.conversation import begin, call_rules, readable, render, thinking_names
from quire.server.errors import ApiError, bad_request
from quire.server.frontend import Frontend, Numbered, frontend_of, json_response
from quire.server.reading import Conversation, Reading
from quire.server.schema import body_of
from quire.server.sse import typed
from quire.text.messages import refuse
from quire.types import (
    CompletionOutput,
    OutputKind,
    Request,
    RequestOutput,
    SamplingParams,
    StructuredOutputsParams,
)

PATH = "/v1/messages"
EFFORTS = ("low", "medium", "high", "xhigh", "max")
CHOICES = {"auto": "auto", "none": "none", "any": "required", "tool": None}  # as OpenAI's
STOP_REASONS = {"stop": "end_turn", "tool_calls": "tool_use"}
router = APIRouter()


@router.post(PATH, openapi_extra=body_of(MessagesRequest))
async def create_message(http: HttpRequest) -> Response:
    """Answer a conversation in Anthropic's form."""
    return await run_call(http, MessagesRequest, "msg_", _prepare)


@router.post(f"{PATH}/count_tokens", openapi_extra=body_of(CountTokensRequest))
async def count_tokens(http: HttpRequest) -> Response:
    """How many tokens a conversation has as the model reads it."""
    front = frontend_of(http)
    ask = await front.read(http, CountTokensRequest)
    front.check_model(ask.model)
    warnings = ask.unknown()

    def count() -> int:
        prompt = _asked(front, ask, warnings).prompt
        return len(front.service.inputs.tokens(prompt, add_special_tokens=False))

    found: dict[str, Any] = {"input_tokens": await asyncio.to_thread(count)}
    return json_response({**found, "warnings": warnings} if warnings else found)


def _prepare(front: Frontend, call: Call, ask: MessagesRequest) -> "tuple[Writer, list[Request]]":
    asked = _asked(front, ask, call.warnings)
    given = {
        "temperature": ask.temperature,
        "top_p": ask.top_p,
        "top_k": ask.top_k,
        "stop": ask.stop_sequences,
    }
    params = SamplingParams(
        **{
            **front.service.inputs.defaults,
            **{name: value for name, value in given.items() if value is not None},
            "max_tokens": ask.max_tokens,
            "structured_outputs": _form(ask),
            "thinking_token_budget": _budget(front, ask.thinking or {}, call.warnings),
            "output_kind": OutputKind.DELTA if ask.stream else OutputKind.FINAL_ONLY,
        }
    )
    (reading,), requests = begin(front, call, asked, ask, params)
    return Writer(call, ask, reading), requests


def _asked(front: Frontend, ask: CountTokensRequest, warnings: list[str]) -> Conversation:
    """Raises ApiError, InvalidRequest: a field cannot be obeyed, or the template refuses the messages."""
    choice = ask.tool_choice or {}
    if (kind := choice.get("type", "auto")) not in CHOICES:
        raise refuse("tool_choice.type", kind, "auto, any, tool or none")
    tools = functions(ask.tools or (), warnings)
    told = None if kind == "none" else readable(tools, front.service.inputs)
    single = bool(choice.get("disable_parallel_tool_use"))
    chosen = CHOICES[kind] or {"type": "function", "name": choice.get("name")}
    messages = conversation(ask.messages, ask.system, warnings)
    last = messages[-1] if messages else {}
    continues = last.get("role") == "assistant"
    if continues and "tool_calls" in last:
        raise bad_request("messages end with a tool_use; send its tool_result too", "messages")
    prompt = render(
        front,
        messages,
        tools=told,
        names=_names(ask, warnings),
        kwargs=ask.chat_template_kwargs,
        begin=not continues,
        continues=continues,
    )
    return Conversation(
        prompt=prompt,
        tools=told or (),
        continued=last["content"] if continues else "",
        calls=call_rules(told, chosen, single=single),
        most_calls=1 if single else None,
    )


def _form(ask: CountTokensRequest) -> StructuredOutputsParams | None:
    """What the text must look like; None if any will do."""
    given = (ask.output_config or {}).get("format") or ask.output_format
    if not given:
        return None
    schema = given.get("schema") if isinstance(given, dict) and given.get("type") == "json_schema" else None
    if not isinstance(schema, dict):
        raise refuse("output_config.format", given, '{"type": "json_schema", "schema": {...}}')
    return StructuredOutputsParams(json=schema)


def _budget(front: Frontend, thinking: dict[str, Any], warnings: list[str]) -> int | None:
    """How many tokens of thinking there may be; clients say so of models that do not think, too."""
    asked = thinking.get("budget_tokens")
    if asked is None or thinking.get("type") == "disabled":
        return None
    if not isinstance(asked, int) or isinstance(asked, bool) or asked < 0:
        raise refuse("thinking.budget_tokens", asked, "an integer of at least 0")
    if front.service.inputs.dialect.reasoning is None:
        warnings.append(
            "'thinking.budget_tokens' has no effect: how this model writes reasoning is not known"
        )
        return None
    return min(asked, MOST)


def _names(ask: CountTokensRequest, warnings: list[str]) -> dict[str, Any]:
    """What the template is told of thinking."""
    names: dict[str, Any] = {}
    kind = (ask.thinking or {}).get("type")
    if kind not in (None, "enabled", "disabled", "adaptive"):
        raise refuse("thinking.type", kind, "enabled, disabled or adaptive")
    if kind is not None:
        names |= thinking_names(kind != "disabled")
    for name, value in (ask.output_config or {}).items():
        if name == "effort" and value is not None:
            if value not in EFFORTS:
                raise refuse("output_config.effort", value, f"one of {', '.join(EFFORTS)}")
            names["reasoning_effort"] = value
        elif name not in ("format", "effort"):
            warnings.append(f"{f'output_config.{name}'[:100]!r} is not a known field; it had no effect")
    return names


class Writer:
    """Writes the output of one call, as one message or as events."""

    end, goes_on = b"", True

    def __init__(self, call: Call, ask: MessagesRequest, reading: Reading):
        self.call, self.ask, self.reading = call, ask, reading
        self.blocks = Blocks(shows_thinking=(ask.thinking or {}).get("display") != "omitted")
        self.num_generated = 0

    def failed(self, error: ApiError) -> bytes:
        """The event of a stream that breaks off."""
        return typed(error.body(PATH))

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The message in one piece."""
        (output,) = outputs
        (new,) = output.outputs
        self._take(new)
        return self._message(output, new)

    async def stream(self, outputs: AsyncGenerator[Numbered, None]) -> AsyncGenerator[bytes, None]:
        """Events of what is new; the message comes first, without content."""
        latest, ended = self.call.timing.latest, False
        async with aclosing(outputs):
            async for _, output in outputs:
                (new,) = output.outputs
                events: list[dict[str, Any]] = []
                if not latest:
                    events = [
                        {"type": "message_start", "message": self._message(output, None)},
                        {"type": "ping"},
                    ]
                latest[0] = output
                if not ended:
                    events += self._take(new)
                    if ended := new.finish_reason is not None:
                        events += self._ending(output, new)
                if events:
                    yield b"".join(map(typed, events))

    def _take(self, new: CompletionOutput) -> list[dict[str, Any]]:
        self.num_generated += len(new.token_ids)
        events = self.blocks.take(self.reading.take(new))
        return events if new.finish_reason is None else [*events, *self.blocks.end()]

    def _ending(self, output: RequestOutput, new: CompletionOutput) -> list[dict[str, Any]]:
        delta: dict[str, Any] = {
            "type": "message_delta",
            "delta": self._reason(new),
            "usage": self._usage(output),
        }
        if self.ask.return_timing:
            delta["timing"] = self.call.timing.body()
        return [delta, {"type": "message_stop"}]

    def _message(self, output: RequestOutput, new: CompletionOutput | None) -> dict[str, Any]:
        """`new`: the last of its output; None: it only begins."""
        return self.call.noted(
            {
                "id": self.call.id,
                "type": "message",
                "role": "assistant",
                "model": self.call.model,
                "content": list(self.blocks.content),
                **self._reason(new),
                "usage": self._usage(output),
            }
        )

    def _reason(self, new: CompletionOutput | None) -> dict[str, Any]:
        if new is None:
            return {"stop_reason": None, "stop_sequence": None}
        if isinstance(new.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": new.stop_reason}
        reason = self.reading.finish_reason(new.finish_reason)
        full = "max_tokens" if self.num_generated >= self.ask.max_tokens else "model_context_window_exceeded"
        return {"stop_reason": STOP_REASONS.get(reason or "", full), "stop_sequence": None}

    def _usage(self, output: RequestOutput) -> dict[str, Any]:
        return {
            "input_tokens": len(output.prompt_token_ids) - output.num_cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": output.num_cached_tokens,
            "output_tokens": self.num_generated,
            "cache_missed_input_tokens": output.cache_misses.by_reason(),
        }
