"""/v1/responses: a conversation as items, which may be kept here and gone on with."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from quire.server.call import Call, run_call
from quire.server.conversation import begin, call_rules, effort_names, readable, render
from quire.server.errors import ApiError, bad_request, not_supported, unavailable
from quire.server.frontend import Frontend, Numbered, frontend_of, json_response
from quire.server.limits import MAX_MESSAGES
from quire.server.openai.items import Items, conversation, functions, items_of
from quire.server.openai.params import response_params, usage
from quire.server.openai.requests import ResponsesRequest
from quire.server.openai.store import Key, Store
from quire.server.reading import Conversation, Reading
from quire.server.schema import RESPONSE, body_of
from quire.server.sse import typed
from quire.text.messages import refuse
from quire.types import CompletionOutput, Request, RequestOutput, SamplingParams

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
RUNNING = ("queued", "in_progress")
OBEYED = ("reasoning.effort", "text.format")
Keep = Callable[[dict[str, Any]], bool]
router = APIRouter()


@router.post("/v1/responses", openapi_extra=body_of(ResponsesRequest))
async def create_response(http: HttpRequest) -> Response:
    """Answer a conversation of items."""
    store = _store(http)

    def at_once(writer: Writer) -> Response | None:
        if not writer.ask.background:
            return None
        begun, timeout_s = writer.response("queued"), frontend_of(http).timeout_s(http)
        if not writer.keep(begun):
            raise unavailable("there is no room to keep a response (--response-store-bytes); try again later")
        store.run((writer.call.tenant, writer.call.id), _alone(http, writer, timeout_s))
        return json_response(begun)

    return await run_call(http, ResponsesRequest, "resp_", partial(_prepare, store), at_once)


@router.get(RESPONSE)
async def retrieve_response(http: HttpRequest, response_id: str) -> Response:
    """A response that was kept, as it is by now."""
    if http.query_params.get("stream") in ("true", "1"):
        raise not_supported("stream", "responses that were kept are not streamed; leave stream out")
    _, answer = _store(http).find(_key(http, response_id))
    return json_response(answer)


@router.delete(RESPONSE)
async def delete_response(http: HttpRequest, response_id: str) -> Response:
    """Keep it no longer; what still runs is stopped."""
    store, key = _store(http), _key(http, response_id)
    store.find(key)
    await store.stop(key)
    store.delete(key)
    return json_response({"id": response_id, "object": "response", "deleted": True})


@router.post(f"{RESPONSE}/cancel")
async def cancel_response(http: HttpRequest, response_id: str) -> Response:
    """Stop a response that runs in the background."""
    store, key = _store(http), _key(http, response_id)
    if not store.find(key)[1]["background"]:
        raise bad_request("only responses with background: true can be cancelled", "response_id")
    await store.stop(key)
    items, answer = store.find(key)
    if answer["status"] in RUNNING:
        answer["status"] = "cancelled"
        store.keep(key, items, answer)
    return json_response(answer)


@router.get(f"{RESPONSE}/input_items")
async def list_input_items(http: HttpRequest, response_id: str) -> Response:
    """What the model has read for a response, a page at a time, the latest first."""
    (items, _), query = _store(http).find(_key(http, response_id)), http.query_params
    limit, order, after = query.get("limit", "20"), query.get("order", "desc"), query.get("after")
    if not limit.isascii() or not limit.isdigit() or not 1 <= int(limit[:9]) <= 100:
        raise refuse("limit", limit, "a number from 1 to 100")
    if order not in ("asc", "desc"):
        raise refuse("order", order, "asc or desc")
    if order == "desc":
        items.reverse()
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise refuse("after", after, "the id of an item")
    begin = 0 if after is None else ids.index(after) + 1
    page = items[begin : begin + int(limit)]
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return json_response({"object": "list", "data": page, **ends, "has_more": begin + len(page) < len(items)})


def _store(http: HttpRequest) -> Store:
    found: Store = http.app.state.responses
    return found


def _key(http: HttpRequest, response_id: str) -> Key:
    return http.scope["tenant"], response_id


async def _alone(http: HttpRequest, writer: "Writer", timeout_s: float) -> None:
    """Answer, though nobody reads it."""
    front = frontend_of(http)
    try:
        async with (
            asyncio.timeout(timeout_s),
            aclosing(writer.stream(front.run(writer.call.timing.requests))) as pieces,
        ):
            async for _ in pieces:
                pass
    except Exception as error:  # whatever it is, whoever asks for the response reads it there
        writer.failed(front.explained(http, error))


def _prepare(
    store: Store, front: Frontend, call: Call, ask: ResponsesRequest
) -> "tuple[Writer, list[Request]]":
    if ask.resume is not None:
        raise bad_request("streams of responses cannot go on; send the request again", "resume")
    call.warnings.extend(_without_effect(ask))
    effort = (ask.reasoning or {}).get("effort")
    if effort is not None and effort not in EFFORTS:
        raise refuse("reasoning.effort", effort, f"one of {', '.join(EFFORTS)}")
    inputs = front.service.inputs
    tools = functions(ask.tools or (), call.warnings)
    told = None if ask.tool_choice == "none" else readable(tools, inputs)
    params = response_params(ask, inputs.defaults)
    items, old = items_of(ask.input, call.id.removeprefix("resp_")), list[dict[str, Any]]()
    if ask.previous_response_id is not None:
        read, before = store.find((call.tenant, ask.previous_response_id), "previous_response_id")
        if before["status"] in RUNNING:
            raise bad_request("it still runs; go on with it when it has ended", "previous_response_id")
        old = [*read, *before["output"]]
    items = [*old, *items]
    if len(items) > MAX_MESSAGES:
        raise bad_request(f"the conversation has {len(items)} items, above {MAX_MESSAGES}", "input")
    messages = conversation(items, ask.instructions, call.warnings, num_old=len(old))
    prompt = render(front, messages, tools=told, names=effort_names(effort), kwargs=ask.chat_template_kwargs)
    most_calls = None if ask.parallel_tool_calls else 1
    calls = call_rules(told, ask.tool_choice, single=not ask.parallel_tool_calls)
    asked = Conversation(prompt=prompt, tools=told or (), calls=calls, most_calls=most_calls)
    (reading,), requests = begin(front, call, asked, ask, params)
    keep = _keeper(store, call, ask, items)
    return Writer(call, ask, reading, params, keep), requests


def _keeper(store: Store, call: Call, ask: ResponsesRequest, items: list[dict[str, Any]]) -> "Keep | None":
    """What keeps the response; None: it is not to be kept.

    Raises:
        ApiError: it runs in the background, and would not be kept.
    """
    if ask.background and ask.stream:
        raise not_supported(
            "stream", "nobody reads a response in the background; leave stream out, and ask for it"
        )
    if store.most_bytes and ask.store is not False:
        return partial(store.keep, (call.tenant, call.id), items)
    if ask.background and store.most_bytes:
        raise bad_request("background is set, and store is false; nobody could ask for the response", "store")
    if ask.background:
        raise not_supported("background", "this server keeps no responses (--response-store-bytes)")
    if ask.store:
        call.warnings.append("'store' has no effect on this server: it keeps none (--response-store-bytes)")
    return None


def _without_effect(ask: ResponsesRequest) -> list[str]:
    """Warnings about parts of fields."""
    return [
        f"{f'{name}.{key}'[:100]!r} has no effect on this server"
        for name, given in (("reasoning", ask.reasoning), ("text", ask.text))
        for key, value in (given or {}).items()
        if value is not None and f"{name}.{key}" not in OBEYED
    ]


class Writer:
    """Writes the output of one call, as one response or as events."""

    end, goes_on = b"", False  # events are numbered, and another server would count others

    def __init__(
        self, call: Call, ask: ResponsesRequest, reading: Reading, params: SamplingParams, keep: Keep | None
    ):
        """`keep`: see `Store.keep`; None: the response is not kept."""
        self.call, self.ask, self.reading, self.params = call, ask, reading, params
        self.kept = keep is not None
        self.keep: Keep = keep or (lambda answer: True)
        self.items = Items(call.id.removeprefix("resp_"))
        self.num_generated = self.num_events = 0

    def failed(self, error: ApiError) -> bytes:
        """The event of a stream that breaks off."""
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        told = {"code": code, "message": error.message}
        return self._numbered({"type": "response.failed", "response": self._ended("failed", error=told)})

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The response in one piece."""
        (output,) = outputs
        (new,) = output.outputs
        self._take(new)
        return self._ended(_status(new), output)

    async def stream(self, outputs: AsyncGenerator[Numbered, None]) -> AsyncGenerator[bytes, None]:
        """Events of what is new, between the response as it begins and as it ends."""
        latest = self.call.timing.latest
        async with aclosing(outputs):
            async for _, output in outputs:
                (new,) = output.outputs
                events: list[dict[str, Any]] = []
                if not latest:
                    began = self.response("in_progress")
                    if self.ask.background:
                        self.keep(began)
                    events = [
                        {"type": f"response.{name}", "response": began} for name in ("created", "in_progress")
                    ]
                latest[0] = output
                events += self._take(new)
                if new.finish_reason is not None:
                    status = _status(new)
                    response = self._ended(status, output)
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

    def _ended(
        self, status: str, output: RequestOutput | None = None, error: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """The response as it is kept. One that has no room says that it was not."""
        response = self.response(status, output, error)
        if not self.keep(response):
            response["store"] = False
            warning = "the response was not kept: there is no room for it (--response-store-bytes)"
            response["warnings"] = [*self.call.warnings, warning]
        return response

    def response(
        self, status: str, output: RequestOutput | None = None, error: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """The response as it is by now."""
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
                "store": self.kept,
                "background": ask.background,
                "previous_response_id": ask.previous_response_id,
                "usage": None if output is None else self._usage(output),
            }
        )

    def _usage(self, output: RequestOutput) -> dict[str, Any]:
        counts = usage([output], self.num_generated, self.reading.num_reasoning_tokens)
        return {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": {**counts["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": counts["completion_tokens_details"],
            "total_tokens": counts["total_tokens"],
        }


def _status(new: CompletionOutput) -> str:
    return "incomplete" if new.finish_reason == "length" else "completed"
