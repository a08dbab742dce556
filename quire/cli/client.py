"""An HTTP/1.1 client that hands over each piece of an answer the moment it arrives. Knows no API.

On bare transports, with httptools: a client must not be what its benchmark measures (`docs/benchmarks.md`).
"""

import asyncio
import json
import ssl
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, NamedTuple, Self, cast
from urllib.parse import urlsplit

import httptools

from quire.errors import ConfigError, RequestFailed

Take = Callable[[bytes, float], None]
MAX_MESSAGE_CHARS = 500
MAX_ERROR_BYTES = 4096
CLOSED = "the connection was closed before the answer was complete"


class ConnectionFailed(RequestFailed):
    """There was no connection, it broke, or what came was not HTTP."""


class Reply(NamedTuple):
    """How an answer begins: its status, and what its header Retry-After says, if it has one."""

    status: int
    retry_after: str


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self.reusable = False
        self.heard = False  # since the last request
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._done: asyncio.Future[int] | None = None
        self._take: Take = lambda piece, now: None
        self._now = 0.0
        self._framed = False
        self._to_end = False  # the body ends with the connection
        self._retry_after = ""

    async def request(self, message: bytes, take: Take) -> Reply:
        """Send, and give `take` each piece of the body, with the time of `perf_counter`.

        Raises:
            ConnectionFailed: the answer did not come, or not completely.
        """
        self.reusable = self.heard = self._framed = self._to_end = False
        self._retry_after = ""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionFailed(CLOSED)
        self._take, self._parser = take, httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(message)
        try:
            return Reply(await self._done, self._retry_after)
        finally:
            self._done = None
            if not self.reusable:
                self.close()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # of the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one, and does not inherit from it

    def data_received(self, data: bytes) -> None:
        self._now, self.heard = time.perf_counter(), True
        if self._done is None:  # an answer that nobody asked for
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(ConnectionFailed(f"the answer is not HTTP/1.1: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        self._transport, self.reusable = None, False
        if self._to_end:
            self._end(int(self._parser.get_status_code()))
        self._end(ConnectionFailed(f"{CLOSED}: {error}" if error else CLOSED))

    def _end(self, how: int | Exception) -> None:
        if self._done is None or self._done.done():
            return
        if isinstance(how, Exception):
            self._done.set_exception(how)
        else:
            self._done.set_result(how)

    # of the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        self._framed |= name in (b"content-length", b"transfer-encoding")
        if name == b"retry-after":
            self._retry_after = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._to_end = not self._framed

    def on_body(self, piece: bytes) -> None:
        self._take(piece, self._now)

    def on_message_complete(self) -> None:
        self.reusable = bool(self._parser.should_keep_alive())
        self._end(int(self._parser.get_status_code()))


class Client:
    """One server. Connections are kept and used again, as many as there are requests at once.

    Raises:
        ConfigError: `base_url` is no http or https address, or a header cannot be sent.
    """

    def __init__(self, base_url: str, headers: Mapping[str, str] | None = None):
        try:
            parts = urlsplit(base_url)
            host, port = parts.hostname, parts.port
        except ValueError:  # a port that is no number, brackets around what is no address
            host = port = None
        if not host or parts.scheme not in ("http", "https"):
            raise ConfigError(f"base_url is {base_url!r}; it must be like http://127.0.0.1:8000")
        self.base_url = base_url.rstrip("/")
        self._host = host
        self._port = port or (443 if parts.scheme == "https" else 80)
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._path = parts.path.rstrip("/")
        self._head = f"Host: {parts.netloc.rpartition('@')[2]}\r\n".encode()
        for name, value in (headers or {}).items():
            if not name or not (name + value).isascii() or not (name + value).isprintable():
                raise ConfigError(f"header {name!r} must be printable ASCII, name and value")
            self._head += f"{name}: {value}\r\n".encode()
        self._open: set[Connection] = set()
        self._idle: list[Connection] = []  # of these, where nothing is asked

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        for connection in self._open:  # those in use, too: uvloop waits for ever for what is left open
            connection.close()

    async def send(self, path: str, body: bytes | None, take: Take) -> Reply:
        """POST `body` as JSON, or GET if there is none.

        Raises:
            ConnectionFailed: no connection, or no complete answer.
        """
        line = f"{'GET' if body is None else 'POST'} {self._path}{path} HTTP/1.1\r\n".encode()
        head = line + self._head + b"Accept: */*\r\n"
        if body is not None:
            head += b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body)
        message = head + b"\r\n" + (body or b"")
        while self._idle:
            kept = self._idle.pop()
            try:
                return await self._ask(kept, message, take)
            except ConnectionFailed:  # the server may close a connection while nothing is asked on it
                if kept.heard:
                    raise
        return await self._ask(await self._connect(), message, take)

    async def json(self, path: str, body: object | None = None) -> Any:
        """The answer as JSON.

        Raises:
            RequestFailed: no connection, a status other than 200, or no JSON.
        """
        pieces: list[bytes] = []
        sent = None if body is None else json.dumps(body).encode()
        status, _ = await self.send(path, sent, lambda piece, now: pieces.append(piece))
        answer = b"".join(pieces)
        if status != HTTPStatus.OK:
            raise RequestFailed(f"{self.base_url}{path}: {refusal(status, answer)}")
        try:
            return json.loads(answer)
        except ValueError:
            raise RequestFailed(f"{self.base_url}{path} answers with something other than JSON") from None

    async def _ask(self, connection: Connection, message: bytes, take: Take) -> Reply:
        try:
            reply = await connection.request(message, take)
        finally:
            if connection.reusable:
                self._idle.append(connection)
            else:
                self._open.discard(connection)
        return reply

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(Connection, self._host, self._port, ssl=self._ssl)
        except OSError as error:
            raise ConnectionFailed(f"no connection to {self.base_url}: {error}") from None
        self._open.add(connection)
        return connection


def refusal(status: int, body: bytes) -> str:
    """`503 Service Unavailable: the queue is full`, of an error's body in OpenAI's form or any other."""
    reason = f"{status} {HTTPStatus(status).phrase}" if status in set(HTTPStatus) else str(status)
    message = error_text(body)
    return f"{reason}: {message}" if message else reason


def error_text(body: bytes) -> str:
    """The message of an error's body, whatever its form."""
    try:
        found = json.loads(body)
    except ValueError:
        found = body.decode(errors="replace")
    return message_in(found)


def message_in(found: object) -> str:
    """The text in `{"error": {"message": ...}}` or the like; else the beginning of what there is."""
    while isinstance(found, dict):
        found = next((found[key] for key in ("error", "message", "detail") if found.get(key)), str(found))
    return " ".join(str(found).split())[:MAX_MESSAGE_CHARS]
