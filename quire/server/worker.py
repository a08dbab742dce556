"""A frontend process beside others at one port: HTTP and text here, requests kept and computed elsewhere.

It obeys the main process and ends with it. Signals of a terminal are the main process's to handle. Loads no torch.
"""

import asyncio
import itertools
import os
import signal
import socket
from collections.abc import Sequence

import msgspec
import uvloop
from prometheus_client.registry import Collector

from quire.config import Config
from quire.engine.distant import DistantKeeper
from quire.engine.link import Link
from quire.engine.merge import Fixed, samples_of
from quire.engine.remote import RemoteEngine
from quire.engine.wire import (
    Collect,
    Drain,
    Drained,
    Failed,
    Message,
    Open,
    Report,
    Scrape,
    Stop,
    ToWorker,
    Up,
)
from quire.errors import QuireError
from quire.server.counts import of_server
from quire.server.frontend import Frontend
from quire.server.http import http_server
from quire.server.settings import ServerSettings

SCRAPE_S = 5.0


def main(sock: socket.socket) -> None:
    """A worker's life: one byte with the listening socket comes first, then `Open`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _, descriptors, _, _ = socket.recv_fds(sock, 1, 1)
    if not descriptors:
        return  # the main process is gone
    with (
        socket.socket(fileno=descriptors[0]) as listener,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(_serve(sock, listener))


async def _serve(sock: socket.socket, listener: socket.socket) -> None:
    worker = Worker(sock)
    link = worker.link
    await link.connect()
    link.closed.add_done_callback(lambda _: os._exit(0))  # at once: nobody is left to obey
    try:
        await worker.run(await worker.opened, listener)
    except QuireError as error:
        link.send(Failed(type(error).__name__, str(error)))
    except OSError as error:
        link.send(
            Failed("ConfigError", f"{error.filename}: {error.strerror}" if error.filename else str(error))
        )
    await link.finish()


class Worker:
    """Obeys the main process."""

    front: Frontend
    keeper: DistantKeeper

    def __init__(self, sock: socket.socket):
        self.link = Link(sock, self.heard, incoming=ToWorker)
        self.opened: asyncio.Future[Open] = asyncio.get_running_loop().create_future()
        self.stopped = asyncio.Event()
        self.scrapes: dict[int, asyncio.Future[Report]] = {}
        self.numbers = itertools.count()
        self.draining: asyncio.Task[None] | None = None

    async def run(self, opened: Open, listener: socket.socket) -> None:
        """Serve until told to stop.

        Raises:
            ConfigError, ModelError: the settings, or the model's files, cannot be used.
            EngineDead: the engine did not start.
        """
        settings = msgspec.convert(opened.settings, ServerSettings)
        engine = RemoteEngine(Config(**opened.options), keeper=self.keeper)
        of_server(engine.metrics, settings)
        self.front = Frontend(engine, settings)
        self.front.scrape = self.scrape
        server = http_server(self.front)
        answering = asyncio.create_task(server.serve(sockets=[listener]))  # probes have answers already
        try:
            await engine.start()
            self.link.send(Up(engine.inputs.chat))
            await self.stopped.wait()
        finally:
            server.should_exit = True
            await answering
        await self.front.close()

    def heard(self, messages: Sequence[Message]) -> None:
        """Carry out what was asked for."""
        for message in messages:
            match message:
                case Open():
                    self.keeper = DistantKeeper(message.prefix, self.link)
                    self.opened.set_result(message)
                case Collect(number):
                    own = self.front
                    self.link.send(Report(number, samples_of(own.service.metrics.registry), own.num_calls))
                case Report(number):
                    if (asked := self.scrapes.pop(number, None)) is not None:
                        asked.set_result(message)
                case Drain(timeout_s):
                    self.draining = asyncio.create_task(self._drain(timeout_s))
                case Stop():
                    self.stopped.set()
                case _:
                    self.keeper.obey(message)

    async def scrape(self) -> tuple[Collector, int]:
        """Metrics of all processes, and how many calls wait in them."""
        number = next(self.numbers)
        asked = self.scrapes[number] = asyncio.get_running_loop().create_future()
        self.link.send(Scrape(number))
        try:
            report = await asyncio.wait_for(asked, SCRAPE_S)
        finally:
            self.scrapes.pop(number, None)
        return Fixed(report.metrics), report.num_calls

    async def _drain(self, timeout_s: float) -> None:
        await self.front.drain(timeout_s)
        self.link.send(Drained())
