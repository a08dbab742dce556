"""Between the routes and the engine: which model, whether there is room, until when. Knows no protocol."""

import asyncio
import itertools
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from typing import Any, TypeVar

import msgspec
from prometheus_client.registry import Collector
from pydantic import BaseModel
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from quire.engine.service import Service, Status
from quire.server.errors import ApiError, bad_request, error_of, unavailable
from quire.server.limits import read_body
from quire.server.settings import ServerSettings
from quire.server.sse import answered
from quire.server.tracing import Tracer
from quire.types import FinishReason, Request, RequestOutput

Body = TypeVar("Body", bound=BaseModel)
Scrape = Callable[[], Awaitable[tuple[Collector, int]]]  # metrics, and how many calls wait for the engine
Numbered = tuple[int, RequestOutput]  # which of a call's prompts, and what is new of it
FAREWELL_S = 2.0
SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
Stream = AsyncGenerator[RequestOutput, None]


class Frontend:
    """What the routes share. `draining` refuses new work and lets the old end.

    Raises:
        ConfigError: traces are asked for, and the packages for them are not installed.
    """

    def __init__(self, service: Service, settings: ServerSettings):
        self.service, self.settings = service, settings
        self.names = settings.served_model_name
        self.numbers = itertools.count()
        self.created_s = int(time.time())
        self.draining = False
        self.active: set[str] = set()  # ids of requests that the engine has
        self.num_calls = 0  # HTTP requests that wait for the engine
        self.changed = asyncio.Event()
        self.scrape: Scrape = self._scrape  # of all frontends at the port
        traces = settings.otlp_traces_endpoint
        self.tracer = None if traces is None else Tracer.to(traces, self.names[0])

    async def _scrape(self) -> tuple[Collector, int]:
        return self.service.metrics.registry, self.num_calls

    @property
    def status(self) -> Status:
        return Status.DRAINING if self.draining else self.service.status

    async def read(self, http: HttpRequest, model: type[Body]) -> Body:
        """The body of a request that the engine can take now.

        Raises:
            ApiError: it cannot, or the body is wrong.
        """
        self.check_ready()
        if self.draining:
            raise unavailable("the server stops; try again, or elsewhere")
        return await read_body(http, model, max_bytes=self.settings.max_request_bytes)

    def check_ready(self) -> None:
        """Raises ApiError: the engine has not started, or has stopped for good."""
        status = self.service.status
        if status in (Status.STARTING, Status.DEAD):
            raise unavailable(f"the engine is {status.value}; try again, or elsewhere")

    def check_model(self, name: str | None) -> str:
        """The name that goes into the answer.

        Raises:
            ApiError: 404, there is no such model.
        """
        if not name:
            return self.names[0]
        if name not in self.names:
            served = ", ".join(self.names)
            raise ApiError(404, f"there is no model {name[:200]!r}; this server has {served}", param="model")
        return name

    def timeout_s(self, http: HttpRequest) -> float:
        """How long a call may take: as the client says in a header, within what the server allows.

        Raises:
            ApiError: the header is no number of seconds.
        """
        given, most = http.headers.get("x-request-timeout"), self.settings.request_timeout
        if given is None:
            return most
        if not SECONDS.fullmatch(given) or not (seconds := float(given)):
            raise bad_request(
                "the header X-Request-Timeout must be seconds above 0, such as 2.5", "x-request-timeout"
            )
        return min(seconds, most)

    def explained(self, http: HttpRequest, error: Exception) -> ApiError:
        """What the client of a request reads about an exception."""
        return error_of(error, http.scope["request_id"])

    async def answer(
        self,
        http: HttpRequest,
        requests: Sequence[Request],
        whole: Callable[[list[RequestOutput]], Any],
    ) -> Response:
        """Run requests to their ends; one JSON body. A client that leaves stops them."""
        timeout_s = self.timeout_s(http)

        async def collect() -> list[RequestOutput]:
            async with aclosing(self.run(requests)) as outputs:
                found = {number: output async for number, output in outputs}
            return [found[number] for number in range(len(requests))]

        outputs = await answered(http.receive, collect(), timeout_s)
        return json_response(whole(outputs))

    async def run(self, requests: Sequence[Request]) -> AsyncGenerator[Numbered, None]:
        """Outputs of all requests, as they come. Leaving early aborts them.

        Raises:
            ApiError, QuireError: one of them failed; the others are aborted.
        """
        with self._counted(requests):
            streams = [self.service.stream(request) for request in requests]
            async with aclosing(_numbered(streams)) as outputs:
                async for number, output in outputs:
                    self._check(output)
                    yield number, output

    def _check(self, output: RequestOutput) -> None:
        for sequence in output.outputs:
            if sequence.finish_reason is None:  # nearly always
                continue
            if sequence.finish_reason == FinishReason.ERROR.value:
                raise ApiError(500, "the engine could not finish this request; sending it again may help")
            if sequence.finish_reason == FinishReason.ABORT.value:
                raise unavailable("the server stops, and this request was not finished; send it again")

    @contextmanager
    def _counted(self, requests: Sequence[Request]) -> Iterator[None]:
        ids = {request.id for request in requests}
        self.active |= ids
        self.num_calls += 1
        self.changed.set()
        try:
            yield
        finally:
            self.active -= ids
            self.num_calls -= 1
            self.changed.set()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new work, let the old end; what has not ended in time is told so."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self.until(lambda: not self.num_calls)
        except TimeoutError:
            for request_id in list(self.active):
                await self.service.abort(request_id)
            with suppress(TimeoutError):  # a client that reads nothing cannot be told
                await asyncio.wait_for(self.until(lambda: not self.num_calls), FAREWELL_S)

    async def close(self) -> None:
        """Nothing is answered any more: send what was noted of it."""
        if self.tracer is not None:
            await self.tracer.close()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds of `num_calls` and `active`."""
        while not holds():
            self.changed.clear()
            await self.changed.wait()


def frontend_of(http: HttpRequest) -> Frontend:
    found: Frontend = http.app.state.frontend
    return found


def json_response(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


async def _numbered(streams: Sequence[Stream]) -> AsyncGenerator[Numbered, None]:
    if len(streams) == 1:
        async with aclosing(streams[0]) as outputs:
            async for output in outputs:
                yield 0, output
        return
    # One place in the queue: a consumer that is slow slows the streams down, and those merge what waits.
    news: asyncio.Queue[Numbered | Exception | None] = asyncio.Queue(maxsize=1)
    tasks = [asyncio.create_task(_feed(news, *pair)) for pair in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            item = await news.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _feed(news: "asyncio.Queue[Numbered | Exception | None]", number: int, stream: Stream) -> None:
    try:
        async with aclosing(stream) as outputs:
            async for output in outputs:
                await news.put((number, output))
    except Exception as error:
        await news.put(error)
    else:
        await news.put(None)
