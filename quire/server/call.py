"""One call of an endpoint on its way through the engine: its requests, names, and what all answers share."""

import asyncio
import dataclasses
import hashlib
import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from quire.engine.inputs import InputProcessor
from quire.errors import InvalidRequest
from quire.server.asking import CallAsk
from quire.server.errors import ApiError, bad_request
from quire.server.frontend import Frontend, Numbered, frontend_of
from quire.server.limits import MAX_PROMPT_SCORES, MAX_SEQUENCES
from quire.server.load import HEADER as LOAD
from quire.server.load import Load
from quire.server.resume import ASKED, Pieces, Resume, begun, going_on, is_over, numbered, resumed, told
from quire.server.sse import EventStream
from quire.server.timing import Timing
from quire.types import Prompt, Request, RequestOutput, SamplingParams, Turn

PRIORITY = re.compile(r"-?[0-9]{1,8}")

Ask = TypeVar("Ask", bound=CallAsk)


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a call is named, and on whose behalf it runs."""

    id: str
    model: str
    tenant: str
    priority: int
    created_s: int
    warnings: list[str]
    timing: Timing = field(default_factory=Timing)

    @classmethod
    def of(cls, front: Frontend, http: HttpRequest, ask: CallAsk, prefix: str) -> "Call":
        """Raises ApiError: there is no such model, or a field that cannot be obeyed."""
        name = front.check_model(ask.model)
        warnings = ask.check()
        given = http.headers.get("x-request-id")
        return cls(
            id=prefix + (http.scope["request_id"] if given or not ask.request_id else ask.request_id),
            model=name,
            tenant=http.scope["tenant"],
            priority=_priority(http, ask),
            created_s=int(time.time()) if ask.resume is None else ask.resume.created,
            warnings=warnings,
        )

    def noted(self, body: dict[str, Any]) -> dict[str, Any]:
        """With the warnings, if there are any."""
        return {**body, "warnings": self.warnings} if self.warnings else dict(body)

    def headers(self, front: Frontend) -> dict[str, str]:
        """What is known by now of the call's time, and of the engine."""
        load = Load.of(front.service.metrics)
        return {**self.timing.header(), **({} if load is None else {LOAD: str(load)})}

    def requests(
        self,
        front: Frontend,
        prompts: Sequence[str | list[int]],
        params: SamplingParams,
        *,
        salt: str | None,
        add_special_tokens: bool,
        resume: Resume | None,
        marks: Mapping[int, str] | None = None,
        turn: Turn | None = None,
    ) -> list[Request]:
        """Tokenize, and have grammars checked; call it off the event loop. `turn`: see `InputProcessor.request`.

        Raises:
            InvalidRequest: a prompt is empty, too long, or together they ask for too much.
        """
        if len(prompts) * params.n > MAX_SEQUENCES:
            raise InvalidRequest(
                f"{len(prompts)} prompts with n = {params.n} are more than {MAX_SEQUENCES} outputs; send fewer",
                param="prompt",
            )
        made = [
            front.service.inputs.request(
                _prompt(prompt, salt),
                params,
                request_id=f"{self.id}-{next(front.numbers)}",
                priority=self.priority,
                tenant=self.tenant,
                arrival_s=time.monotonic(),
                add_special_tokens=add_special_tokens,
                marks=marks,
                turn=turn,
            )
            for prompt in prompts
        ]
        loose = made[0].grammar.loose if made[0].grammar is not None else ()
        self.warnings.extend(
            f"the schema of {name[:100]!r} cannot be obeyed; its arguments may be any object"
            for name in loose
        )
        _check_scores(front.service.inputs, made, params)
        if resume is not None:
            made = resumed(front.service.inputs, made, resume)
        self.timing.requests += made
        return made


class Writer(Protocol):
    """Writes the outputs of one call, as its protocol wants them.

    Attributes:
        end: what follows the last piece of a stream.
        goes_on: another server may write the rest of a stream that breaks off.
    """

    end: bytes
    goes_on: bool

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The body of an answer in one piece; outputs are in the order of the prompts."""

    def stream(self, outputs: AsyncGenerator[Numbered, None]) -> AsyncGenerator[bytes, None]:
        """Events of what is new in each output."""

    def failed(self, error: ApiError) -> bytes:
        """The event of a stream that breaks off; `end` follows it."""


Written = TypeVar("Written", bound=Writer)


async def run_call(
    http: HttpRequest,
    kind: type[Ask],
    prefix: str,
    prepare: Callable[[Frontend, Call, Ask], tuple[Written, list[Request]]],
    at_once: Callable[[Written], Response | None] = lambda writer: None,
) -> Response:
    """A generation call from its body to its answer.

    Args:
        prefix: begins its id.
        prepare: runs in a thread.
        at_once: answers a call that goes on without its client, if it is one.

    Raises:
        ApiError, QuireError: it is refused, or failed before anything was sent.
    """
    front = frontend_of(http)
    ask = await front.read(http, kind)
    call = Call.of(front, http, ask, prefix)
    writer, requests = await asyncio.to_thread(lambda: prepare(front, call, ask))
    if (answer := at_once(writer)) is not None:
        return answer
    http.scope["timing"] = call.timing  # for whoever traces
    if ask.stream:
        return await _stream(front, http, call, writer)

    def whole(outputs: list[RequestOutput]) -> dict[str, Any]:
        call.timing.latest.update(enumerate(outputs))
        body = writer.whole(outputs)
        return {**body, "timing": call.timing.body()} if ask.return_timing else body

    response = await front.answer(http, requests, whole)
    response.headers.update(call.headers(front))
    return response


async def _stream(front: Frontend, http: HttpRequest, call: Call, writer: Writer) -> Response:
    """A stream: perhaps one that another server began, perhaps one that another may have to end."""
    requests, resumable = call.timing.requests, writer.goes_on and ASKED in http.headers
    write: Pieces = writer.stream
    if resumable:
        requests = [_seeded(request, f"{call.id} {number}") for number, request in enumerate(requests)]
    inputs, numbers = front.service.inputs, [n for n, request in enumerate(requests) if not is_over(request)]
    if sent := await asyncio.to_thread(lambda: begun(inputs, requests)):
        write = going_on(write, sent)
    if resumable:
        write = told(write, requests[0].params.n, len(numbers))
    if len(numbers) < len(requests):
        write = numbered(write, numbers)

    def headers() -> dict[str, str]:
        return {**call.headers(front), **({ASKED: str(call.created_s)} if resumable else {})}

    return EventStream(
        write(front.run([requests[number] for number in numbers])),
        lambda error: writer.failed(front.explained(http, error)),
        end=writer.end,
        timeout_s=front.timeout_s(http),
        late_headers=headers,
    )


def _seeded(request: Request, name: str) -> Request:
    """With a seed, so that another server draws what this one would have drawn."""
    if request.params.seed is not None:
        return request
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1
    return dataclasses.replace(request, params=dataclasses.replace(request.params, seed=seed))


def _prompt(prompt: str | list[int], salt: str | None) -> Prompt:
    if isinstance(prompt, str):
        return {"prompt": prompt, "cache_salt": salt or ""}
    return {"prompt_token_ids": prompt, "cache_salt": salt or ""}


def _check_scores(inputs: InputProcessor, requests: Sequence[Request], params: SamplingParams) -> None:
    if params.prompt_logprobs is None:
        return
    each = inputs.vocab_size if params.prompt_logprobs == -1 else params.prompt_logprobs + 1
    scores = each * sum(len(request.prompt_token_ids) for request in requests)
    if scores > MAX_PROMPT_SCORES:
        raise InvalidRequest(
            f"prompt_logprobs asks for {scores} log probabilities; at most {MAX_PROMPT_SCORES} are given at once",
            param="prompt_logprobs",
        )


def _priority(http: HttpRequest, ask: CallAsk) -> int:
    given = http.headers.get("x-vllm-priority")
    if given is None:
        return ask.priority
    if not PRIORITY.fullmatch(given):
        raise bad_request("the header X-Vllm-Priority must be a small integer", "priority")
    return int(given)
