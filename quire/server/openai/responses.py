"""POST /v1/responses: a conversation as items. Responses are not kept: each request brings the whole conversation."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from quire.server.call import Call, run_call
from quire.server.conversation import begin, effort_names, readable, render
from quire.server.errors import ApiError, bad_request, not_supported
from quire.server.frontend import Frontend, Numbered
from quire.server.openai.items import Items, conversation, functions
from quire.server.openai.params import response_params
from quire.server.openai.requests import ResponsesRequest
from quire.server.reading import Conversation, Reading
from quire.server.schema import body_of
from quire.server.sse import typed
from quire.text.messages import refuse
from quire.types import CompletionOutput, Request, RequestOutput, SamplingParams

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
router = APIRouter()


@router.post("/v1/responses", openapi_extra=body_of(ResponsesRequest))
async def create_response(http: HttpRequest) -> Response:
    """Answer a conversation of items."""
    return await run_call(http, ResponsesRequest, "resp_", _prepare)


def _prepare(front: Frontend, call: Call, ask: ResponsesRequest) -> "tuple[Writer, list[Request]]":
    if ask.resume is not None:
        raise bad_request("streams of responses cannot go on; send the request again", "resume")
    if ask.tool_choice not in (None, "none", "auto"):
        raise not_supported("tool_choice", "calls cannot be forced yet; use auto")
    effort = (ask.reasoning or {}).get("effort")
    if effort is not None and effort not in EFFORTS:
        raise refuse("reasoning.effort", effort, f"one of {', '.join(EFFORTS)}")
    inputs = front.service.inputs
    tools = functions(ask.tools or (), call.warnings)
    told = None if ask.tool_choice == "none" else readable(tools, inputs)
    params = response_params(ask, inputs.defaults)
    if told and params.structured_outputs is not None:
        raise not_supported(
            "tools", "text that is constrained can hold no calls yet; set tool_choice to none"
        )
    messages = conversation(ask.input, ask.instructions, call.warnings)
    prompt = render(front, messages, tools=told, names=effort_names(effort), kwargs=ask.chat_template_kwargs)
    most_calls = None if ask.parallel_tool_calls else 1
    asked = Conversation(prompt=prompt, tools=told or (), most_calls=most_calls)
    (reading,), requests = begin(front, call, asked, ask, params)
    return Writer(call, ask, reading, params), requests


class Writer:
    """Writes the output of one call, as one response or as events."""

    end, goes_on = b"", False  # events are numbered, and another server would count others

    def __init__(self, call: Call, ask: ResponsesRequest, reading: Reading, params: SamplingParams):
        self.call, self.ask, self.reading, self.params = call, ask, reading, params
        self.items = Items(call.id.removeprefix("resp_"))
        self.num_generated = self.num_events = 0

    def failed(self, error: ApiError) -> bytes:
        """The event of a stream that breaks off."""
        told = {"code": "server_error", "message": error.message}
        return self._numbered({"type": "response.failed", "response": self._response("failed", error=told)})

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The response in one piece."""
        (output,) = outputs
        (new,) = output.outputs
        self._take(new)
        return self._response(_status(new), output)

    async def stream(self, outputs: AsyncGenerator[Numbered, None]) -> AsyncGenerator[bytes, None]:
        """Events of what is new, between the response as it begins and as it ends."""
        latest = self.call.timing.latest
        async with aclosing(outputs):
            async for _, output in outputs:
                (new,) = output.outputs
                events: list[dict[str, Any]] = []
                if not latest:
                    began = self._response("in_progress")
                    events = [
                        {"type": f"response.{name}", "response": began} for name in ("created", "in_progress")
                    ]
                latest[0] = output
                events += self._take(new)
                if new.finish_reason is not None:
                    status = _status(new)
                    response = self._response(status, output)
                    if self.ask.return_timing:
                        response["timing"] = self.call.timing.body()
                    events.append({"type": f"response.{status}", "response": response})
                if events:
                    yield b"".join(map(self._numbered, events))

    def _numbered(self, event: dict[str, Any]) -> bytes:
        event["sequence_number"] = self.num_events
        self.num_events += 1
        return typed(event)

    def _take(self, new: CompletionOutput) -> list[dict[str, Any]]:
        self.num_generated += len(new.token_ids)
        events = self.items.take(self.reading.take(new))
        return events if new.finish_reason is None else [*events, *self.items.end(_status(new))]

    def _response(
        self, status: str, output: RequestOutput | None = None, error: dict[str, str] | None = None
    ) -> dict[str, Any]:
        ask = self.ask
        return self.call.noted(
            {
                "id": self.call.id,
                "object": "response",
                "created_at": self.call.created_s,
                "status": status,
                "model": self.call.model,
                "output": list(self.items.output),
                "error": error,
                "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
                "instructions": ask.instructions,
                "max_output_tokens": ask.max_output_tokens,
                "metadata": ask.metadata or {},
                "parallel_tool_calls": ask.parallel_tool_calls,
                "temperature": self.params.temperature,
                "top_p": self.params.top_p,
                "tool_choice": ask.tool_choice or "auto",
                "tools": ask.tools or [],
                "reasoning": {"effort": None, "summary": None, **(ask.reasoning or {})},
                "text": {"format": {"type": "text"}, **(ask.text or {})},
                "truncation": "disabled",
                "store": False,
                "background": False,
                "previous_response_id": None,
                "usage": None if output is None else self._usage(output),
            }
        )

    def _usage(self, output: RequestOutput) -> dict[str, Any]:
        num_prompt, cached = len(output.prompt_token_ids), output.num_cached_tokens
        return {
            "input_tokens": num_prompt,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": self.num_generated,
            "output_tokens_details": {"reasoning_tokens": self.reading.num_reasoning_tokens},
            "total_tokens": num_prompt + self.num_generated,
        }


def _status(new: CompletionOutput) -> str:
    return "incomplete" if new.finish_reason == "length" else "completed"
