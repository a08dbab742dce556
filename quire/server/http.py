"""The HTTP server under the application: connections and the parser. Knows no route and no engine."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from quire.server.app import wrap
from quire.server.errors import ApiError, bad_request
from quire.server.frontend import FAREWELL_S, Frontend
from quire.server.limits import HEAD_TIMEOUT_S, MAX_HEADER_BYTES


class HttpProtocol(HttpToolsProtocol):
    """HTTP/1.1, with an end to headers, in bytes and in time: the parser itself collects them without one."""

    head_bytes = 0
    in_head = True
    head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self.in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self.in_head, self.head_bytes = False, 0
        self._stop_timer()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.is_closing():
            return None
        if self.in_head:
            self.head_bytes += len(data)
            if self.head_bytes > MAX_HEADER_BYTES:
                return self.send_400_response("The headers are too large.")
        if self.head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_head()
        return None

    def send_400_response(self, msg: str) -> None:
        """A refusal like the others."""
        self._refuse(bad_request(msg))

    def _expect_head(self) -> None:
        late = ApiError(408, "the headers did not arrive")
        self.head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._refuse, late)

    def _stop_timer(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None

    def _refuse(self, error: ApiError) -> None:
        """Answer and close. A response that has begun is cut off: it must not be written into."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body, status = bytes(error.response().body), HTTPStatus(error.status)
            first = f"HTTP/1.1 {status.value} {status.phrase}"
            lines = (first, "content-type: application/json", "connection: close")
            head = "\r\n".join([*lines, f"content-length: {len(body)}", "", ""])
            self.transport.write(head.encode() + body)
        self.transport.close()


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers, which know nothing of draining."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_server(front: Frontend) -> HttpServer:
    """The HTTP server over a frontend; see `server_of`."""
    files = {"ssl_certfile": front.settings.ssl_certfile, "ssl_keyfile": front.settings.ssl_keyfile}
    server = server_of(wrap(front), goodbye_s=int(FAREWELL_S), **files)
    server.config.load()  # so that a certificate that cannot be read is known now
    return server


def server_of(app: ASGIApp, *, goodbye_s: int, **files: str | None) -> HttpServer:
    """An HTTP server over an application; `serve(sockets=[...])` runs it until `should_exit`.

    `goodbye_s` is for answers that are on their way then; `files` are uvicorn's names for those of TLS.
    """
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # what it has to say, we say ourselves
    config = uvicorn.Config(
        app,
        http=HttpProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=goodbye_s,
        **files,  # type: ignore[arg-type]
    )
    return HttpServer(config)
