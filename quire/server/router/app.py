"""The router as an ASGI application: its own probes and metrics, and everything of the API forwarded."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from quire.engine.families import Families
from quire.engine.router import Router
from quire.server.access import Access
from quire.server.auth import Auth, Keys
from quire.server.counts import HttpCounts, watch_process
from quire.server.errors import ClientGone, unavailable
from quire.server.frontend import json_response
from quire.server.limits import LARGE_BYTES, read_bytes
from quire.server.router.ask import PIECE_TOKENS, Ask, check_path, read_ask
from quire.server.router.backend import Backend
from quire.server.router.counts import Counts
from quire.server.router.relay import Relay
from quire.server.router.settings import RouterSettings
from quire.server.settings import lines_of_keys
from quire.server.sse import gone, unless_gone

POLL_EVERY_S = 1.0
MOST_BODIES = 64  # largest ones that are held at a time


class Forwarder:
    """Forwards requests; `start` comes first, `close` last."""

    def __init__(self, settings: RouterSettings):
        names = [url.rstrip("/") for url in settings.backend]
        self.settings, self.registry, families = settings, CollectorRegistry(), Families({})
        self.registry.register(families)
        watch_process(self.registry)
        self.http_counts, self.counts = HttpCounts(families), Counts(families)
        self.router = Router(
            names,
            piece_tokens=PIECE_TOKENS,
            capacity=max(settings.cache_tokens // PIECE_TOKENS, 1),
            most_s=settings.max_queue_seconds,
            seed=time.time_ns(),  # so that two routers do not choose alike
        )
        key = "" if settings.backend_key_file is None else _key(Path(settings.backend_key_file))
        self.backends: Sequence[Backend] = [
            Backend(url, number, self.router, key) for number, url in enumerate(names)
        ]
        self.polling: list[asyncio.Task[None]] = []
        self.draining, self.num_open, self.num_bytes = False, 0, 0
        self.idle = asyncio.Event()

    def app(self) -> ASGIApp:
        """With keys, request ids and a log around it."""
        app = Auth(self, Keys.of(self.settings))
        return Access(app, self.http_counts, log=not self.settings.disable_access_log)

    async def start(self) -> None:
        """Ask every replica how it is, and again every second."""
        await asyncio.gather(*(backend.poll() for backend in self.backends))
        self.polling = [asyncio.create_task(self._poll(backend)) for backend in self.backends]

    async def drain(self, timeout_s: float) -> None:
        """Refuse new work, let the old end."""
        self.draining = True
        end = time.monotonic() + timeout_s
        while self.num_open and time.monotonic() < end:
            self.idle.clear()
            waiting = asyncio.create_task(self.idle.wait())
            await asyncio.wait([waiting], timeout=end - time.monotonic())
            waiting.cancel()

    async def close(self) -> None:
        """Leave no connection."""
        for task in self.polling:
            task.cancel()
        await asyncio.gather(*self.polling, return_exceptions=True)
        await asyncio.gather(*(backend.close() for backend in self.backends))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        http = HttpRequest(scope, receive)
        own = self._own(http)
        if own is not None:
            await own(scope, receive, send)
            return
        self.num_open += 1
        try:
            with suppress(
                ClientGone
            ):  # also if it must be: an answer that breaks off is told by the connection
                await self._forward(http, send)
        finally:
            self.num_open -= 1
            if not self.num_open:
                self.idle.set()

    def _own(self, http: HttpRequest) -> Response | None:
        """The answer to what is asked of the router itself."""
        if http.method not in ("GET", "HEAD"):
            return None
        now = time.monotonic()
        match http.url.path:
            case "/livez" | "/startupz":
                return PlainTextResponse("ok")
            case "/readyz" | "/health" | "/ping":
                status = (
                    "draining" if self.draining else "ready" if self.router.is_able(now) else "no replica"
                )
                return PlainTextResponse(status, 200 if status == "ready" else 503)
            case "/load":
                return json_response({"server_load": self.num_open})
            case "/metrics":
                self.counts.read(self.router, now)
                return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)
        return None

    async def _forward(self, http: HttpRequest, send: Send) -> None:
        """Raises what `error_of` knows, if nothing was sent."""
        check_path(http.scope["raw_path"])
        if self.draining:
            raise unavailable("the router stops; try again, or elsewhere")
        largest = self.settings.max_request_bytes
        if self.num_open > self.settings.max_num_reqs or self.num_bytes > MOST_BODIES * largest:
            raise unavailable("the router has more requests than it takes at a time")
        body = await read_bytes(http, largest)
        self.num_bytes += len(body)
        try:
            ask = await self._read(http, body)
            relay = Relay(self, ask, http.scope["request_id"], send)
            await unless_gone(relay.run(self.settings.request_timeout), gone(http.receive))
        finally:
            self.num_bytes -= len(body)

    async def _read(self, http: HttpRequest, body: bytes) -> Ask:
        if len(body) > LARGE_BYTES:
            return await asyncio.to_thread(read_ask, http, body)
        return read_ask(http, body)

    async def _poll(self, backend: Backend) -> None:
        while True:
            await asyncio.sleep(POLL_EVERY_S)
            await backend.poll()


def _key(path: Path) -> str:
    return lines_of_keys("backend_key_file", path)[0][1][-1]
