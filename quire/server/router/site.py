"""Listens, forwards and stops."""

import asyncio
import socket
from collections.abc import Callable

from quire.server.frontend import FAREWELL_S
from quire.server.http import server_of
from quire.server.router.app import Forwarder
from quire.server.router.settings import RouterSettings
from quire.server.run import Signals, run_site


class RouterSite:
    """See `Site`."""

    def __init__(self, settings: RouterSettings, listener: socket.socket):
        self.forwarder = Forwarder(settings)
        files = {"ssl_certfile": settings.ssl_certfile, "ssl_keyfile": settings.ssl_keyfile}
        self.server = server_of(self.forwarder.app(), goodbye_s=int(FAREWELL_S), **files)
        self.server.config.load()  # so that a certificate that cannot be read is known now
        self.listener = listener
        self.answering: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """See `Site`."""
        await self.forwarder.start()
        self.answering = asyncio.create_task(self.server.serve(sockets=[self.listener]))

    async def end(self) -> None:
        """See `Site`: only a signal ends a router."""
        await asyncio.Event().wait()

    async def drain(self, timeout_s: float) -> None:
        """See `Site`."""
        await self.forwarder.drain(timeout_s)

    async def close(self, *, at_once: bool) -> None:
        """See `Site`."""
        self.server.should_exit, self.server.force_exit = True, at_once
        if self.answering is not None:
            await self.answering
        await self.forwarder.close()


async def route(settings: RouterSettings, listener: socket.socket, announce: Callable[[], None]) -> int:
    """Forward until a signal comes; returns the exit code. `announce` is called when ready."""
    signals = Signals()
    try:
        return await run_site(RouterSite(settings, listener), signals, settings.drain_timeout, announce)
    finally:
        signals.close()
