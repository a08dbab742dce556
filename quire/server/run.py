"""Listens, serves and stops: sockets, signals and the order in which things end. Knows no route."""

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from quire.engine.service import Service, Status
from quire.errors import ConfigError
from quire.log import logger
from quire.server.app import wrap
from quire.server.frontend import FAREWELL_S, Frontend
from quire.server.limits import MAX_HEADER_BYTES
from quire.server.settings import ServerSettings

BACKLOG = 2048
DRAINED, FORCED, ENGINE_DEAD = 0, 130, 70  # exit codes
WATCH_S = 0.5


class Engine(Service, Protocol):
    """A service that is started and stopped here."""

    async def start(self) -> None: ...

    def shutdown(self) -> None: ...


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


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers, which know nothing of draining."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(settings: ServerSettings) -> socket.socket:
    """The listening socket, before anything slow begins.

    Raises:
        ConfigError: the address is in use, not this machine's, or not allowed.
    """
    where = f"host {settings.host!r} and port {settings.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        hint = "; another port may be free: --port 0 takes one" if error.errno == errno.EADDRINUSE else ""
        raise ConfigError(f"cannot listen at {where}: {error.strerror}{hint}") from None
    return listener


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


async def serve(
    engine: Engine, settings: ServerSettings, listener: socket.socket, announce: Callable[[], None]
) -> int:
    """Serve until a signal comes or the engine is dead; returns the exit code. `announce` is called when ready.

    SIGTERM and SIGINT let what runs end, up to `drain_timeout`; the second one stops at once.

    Raises:
        ConfigError, ModelError, CapacityError: the engine cannot be started.
    """
    front, signals = Frontend(engine, settings), Signals()
    server = http_server(front)
    answering = asyncio.create_task(
        server.serve(sockets=[listener])
    )  # probes have answers from the beginning
    try:
        starting = asyncio.create_task(engine.start())
        await first(starting, signals.once(), answering)
        if not starting.done():
            await cancelled(starting)
            return FORCED
        await starting
        announce()
        await first(asyncio.create_task(_until_dead(engine)), signals.once(), answering)
        if engine.status is Status.DEAD:
            return ENGINE_DEAD
        logger.info(
            "stopping: requests have %g s to end; a second signal stops at once", settings.drain_timeout
        )
        draining = asyncio.create_task(front.drain(settings.drain_timeout))
        await first(draining, signals.twice())
        return DRAINED if draining.done() else FORCED
    finally:
        server.should_exit = True
        server.force_exit = signals.count > 1
        await answering
        engine.shutdown()
        signals.close()


class Signals:
    """Counts the signals that ask this process to stop."""

    KINDS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.count, self.loop = 0, asyncio.get_running_loop()
        self.events = (asyncio.Event(), asyncio.Event())
        for kind in self.KINDS:
            self.loop.add_signal_handler(kind, self._came)

    def once(self) -> "asyncio.Task[Any]":
        return asyncio.create_task(self.events[0].wait())

    def twice(self) -> "asyncio.Task[Any]":
        return asyncio.create_task(self.events[1].wait())

    def close(self) -> None:
        for kind in self.KINDS:
            self.loop.remove_signal_handler(kind)

    def _came(self) -> None:
        self.count += 1
        for event in self.events[: self.count]:
            event.set()


async def first(*tasks: "asyncio.Task[Any]") -> None:
    """Wait until one of them is done."""
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


async def cancelled(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _until_dead(engine: Engine) -> None:
    while engine.status is not Status.DEAD:
        await asyncio.sleep(WATCH_S)
