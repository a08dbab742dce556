"""The HTTP server under the application: connections and the parser. Knows no route and no engine."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from quire.server.app import wrap
from quire.server.errors import bad_request
from quire.server.frontend import FAREWELL_S, Frontend
from quire.server.limits import MAX_HEADER_BYTES


class HttpProtocol(HttpToolsProtocol):
    """HTTP/1.1, with an end to headers: the parser itself collects them without one."""

    head_bytes = 0
    in_head = True

    def on_message_begin(self) -> None:
        self.in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self.in_head, self.head_bytes = False, 0
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.in_head:
            self.head_bytes += len(data)
            if self.head_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
                self.send_400_response("The headers are too large.")

    def send_400_response(self, msg: str) -> None:
        """A refusal like the others. A response that has begun is cut off: it must not be written into."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = bad_request(msg).response().body
            lines = ("HTTP/1.1 400 Bad Request", "content-type: application/json", "connection: close")
            head = "\r\n".join([*lines, f"content-length: {len(body)}", "", ""])
            self.transport.write(head.encode() + bytes(body))
        self.transport.close()


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers, which know nothing of draining."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_server(front: Frontend) -> HttpServer:
    """The HTTP server over a frontend; `serve(sockets=[...])` runs it until `should_exit`."""
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # what it has to say, we say ourselves
    config = uvicorn.Config(
        wrap(front),
        http=HttpProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ssl_certfile=front.settings.ssl_certfile,
        ssl_keyfile=front.settings.ssl_keyfile,
        timeout_graceful_shutdown=int(FAREWELL_S),
    )
    config.load()  # so that a certificate that cannot be read is known now
    return HttpServer(config)
