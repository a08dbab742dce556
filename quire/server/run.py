"""Listens, serves and stops: sockets, signals and the order in which things end. Knows no route."""

import asyncio
import errno
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, ExitStack
from typing import Any, Protocol

from quire.config import Config
from quire.engine.groups import Groups
from quire.engine.keeper import Keeper, Keepers, Keeping
from quire.engine.remote import RemoteEngine
from quire.engine.service import Service, Status
from quire.engine.wire import Facts
from quire.errors import ConfigError, EngineDead
from quire.log import logger
from quire.server.admin import Control, administered
from quire.server.counts import of_server
from quire.server.frontend import Frontend
from quire.server.http import http_server
from quire.server.settings import ServerSettings
from quire.server.workers import Workers

BACKLOG = 2048
UNSENT_BYTES = 64 << 10  # that the system holds for a slow client; beyond it, what is new is merged
DRAINED, FORCED, ENGINE_DEAD = 0, 130, 70  # exit codes
WATCH_S = 0.5


class Engine(Service, Protocol):
    """A service that is started and stopped here."""

    async def start(self) -> None: ...

    def shutdown(self) -> None: ...


class Address(Protocol):
    """Where to listen."""

    @property
    def host(self) -> str: ...

    @property
    def port(self) -> int: ...


def listen(settings: Address) -> socket.socket:
    """The listening socket, before anything slow begins.

    Raises:
        ConfigError: the address is in use, not this machine's, or not allowed.
    """
    listener = _bound(settings, settings.port, shared=False)
    listener.listen(BACKLOG)
    return listener


def listen_several(settings: ServerSettings) -> list[socket.socket]:
    """Listening sockets of one port, among which the kernel divides connections: one for each worker.

    At one socket for all, the worker that wakes first would take whatever waits there.

    Raises:
        ConfigError: see `listen`.
    """
    with _bound(
        settings, settings.port, shared=False
    ) as alone:  # nobody else's, of whom the port is shared then
        port = alone.getsockname()[1]
    with ExitStack() as opened:
        listeners = []
        for _ in range(settings.api_server_count):
            listeners.append(opened.enter_context(_bound(settings, port, shared=True)))
            listeners[-1].listen(BACKLOG)
        opened.pop_all()
    return listeners


def _bound(settings: Address, port: int, *, shared: bool) -> socket.socket:
    with ExitStack() as opened:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                settings.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = opened.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
            listener.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES
            )  # connections inherit it
            listener.bind(address)
        except OSError as error:
            hint = "; another port may be free: --port 0 takes one" if error.errno == errno.EADDRINUSE else ""
            where = f"host {settings.host!r} and port {port}"
            raise ConfigError(f"cannot listen at {where}: {error.strerror}{hint}") from None
        opened.pop_all()
    return listener


class Site(Protocol):
    """What serves: this process alone, or several. Made once signals are heeded; always closed."""

    async def start(self) -> None:
        """Return when requests are taken.

        Raises:
            ConfigError, ModelError, CapacityError, EngineDead: that will never be.
        """

    async def end(self) -> None:
        """Wait until nothing can be served any more."""

    async def drain(self, timeout_s: float) -> None:
        """Refuse new work, let the old end."""

    async def close(self, *, at_once: bool) -> None:
        """Leave no process and no socket."""


class Alone:
    """HTTP and an engine's text in this process."""

    def __init__(self, engine: Engine, settings: ServerSettings, listener: socket.socket):
        of_server(engine.metrics, settings)
        self.engine, self.front = engine, Frontend(engine, settings)
        self.server = http_server(self.front)
        # Probes have answers from the beginning.
        self.answering = asyncio.create_task(self.server.serve(sockets=[listener]))

    async def start(self) -> None:
        """See `Site`."""
        await self.engine.start()

    async def end(self) -> None:
        """See `Site`."""
        while self.engine.status is not Status.DEAD and not self.answering.done():
            await asyncio.wait([self.answering], timeout=WATCH_S)

    async def drain(self, timeout_s: float) -> None:
        """See `Site`."""
        await self.front.drain(timeout_s)

    async def close(self, *, at_once: bool) -> None:
        """See `Site`."""
        self.server.should_exit, self.server.force_exit = True, at_once
        await self.answering
        if not at_once:
            await self.front.close()
        self.engine.shutdown()


class Several:
    """HTTP and text in processes of their own; here are the requests and the engine."""

    def __init__(
        self, keeper: Keepers, config: Config, settings: ServerSettings, listeners: Sequence[socket.socket]
    ):
        of_server(keeper.metrics, settings)
        self.keeper, self.workers = keeper, Workers(keeper, config, settings, listeners)

    async def start(self) -> None:
        """See `Site`."""
        await self.workers.start()

    async def end(self) -> None:
        """See `Site`."""
        while self.keeper.status is not Status.DEAD and not self.workers.failure.done():
            await asyncio.wait([self.workers.failure], timeout=WATCH_S)

    async def drain(self, timeout_s: float) -> None:
        """See `Site`."""
        await self.workers.drain(timeout_s)

    async def close(self, *, at_once: bool) -> None:
        """See `Site`."""
        await self.workers.close(at_once=at_once)
        self.keeper.close(EngineDead("the server stopped"))


async def serve(
    engine: Engine, settings: ServerSettings, listener: socket.socket, announce: Callable[[], None]
) -> int:
    """Serve until a signal comes or the engine is dead; returns the exit code. `announce` is called when ready.

    SIGTERM and SIGINT let what runs end, up to `drain_timeout`; the second one stops at once.

    Raises:
        ConfigError, ModelError, CapacityError: the engine cannot be started.
    """
    keeper = engine.keeper if isinstance(engine, RemoteEngine) else None
    return await _serve(lambda: Alone(engine, settings, listener), keeper, settings, announce)


async def serve_several(
    keeper: Keepers,
    config: Config,
    settings: ServerSettings,
    listeners: Sequence[socket.socket],
    announce: Callable[[Facts, str | None], None],
) -> int:
    """As `serve`, with a process for HTTP at each of the listeners; `announce` gets what `Workers` found out."""
    several: list[Several] = []

    def make() -> Several:
        several.append(Several(keeper, config, settings, listeners))
        return several[0]

    def ready() -> None:
        workers = several[0].workers
        if workers.facts is not None:
            announce(workers.facts, workers.chat)

    return await _serve(make, keeper, settings, ready)


async def _serve(
    make: Callable[[], Site], keeper: Keeping | None, settings: ServerSettings, announce: Callable[[], None]
) -> int:
    signals = Signals()
    try:
        async with AsyncExitStack() as stack:
            if isinstance(keeper, Keeper | Groups):
                await stack.enter_async_context(administered(Control(keeper, settings, signals.ask)))
            return await run_site(make(), signals, settings.drain_timeout, announce)
    finally:
        signals.close()


async def run_site(
    site: Site, signals: "Signals", drain_timeout_s: float, announce: Callable[[], None]
) -> int:
    """Serve until a signal comes or nothing can be served any more; returns the exit code."""
    end = asyncio.create_task(site.end())
    try:
        starting = asyncio.create_task(site.start())
        await first(starting, signals.once(), end)
        if signals.count and not starting.done():
            await cancelled(starting)
            return FORCED
        await starting
        announce()
        await first(end, signals.once())
        if end.done():
            return ENGINE_DEAD
        logger.info("stopping: requests have %g s to end; a second signal stops at once", drain_timeout_s)
        draining = asyncio.create_task(site.drain(drain_timeout_s))
        await first(draining, signals.twice())
        return DRAINED if draining.done() else FORCED
    finally:
        await cancelled(end)
        await site.close(at_once=signals.count > 1)


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

    def ask(self) -> bool:
        """Do as if the first signal had come; False if it has."""
        if self.count:
            return False
        self._came()
        return True

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
