"""Several frontend processes at one port, from the main process: starts, replaces and stops them. Knows no route.

main: keeper ── engine group
  ├── worker: HTTP, text     each has a listening socket, among which the kernel divides connections;
  └── worker: HTTP, text     one that dies loses its own and nobody else's
"""

import asyncio
import dataclasses
import itertools
import socket
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

import msgspec

from quire.config import Config
from quire.engine.events import TokenEvent
from quire.engine.keeper import Keepers
from quire.engine.link import Link
from quire.engine.merge import kept, merged, samples_of
from quire.engine.nursery import Nursery
from quire.engine.service import Status
from quire.engine.supervisor import ending
from quire.engine.wire import (
    Abort,
    Add,
    Collect,
    Drain,
    Drained,
    Facts,
    Failed,
    FromWorker,
    Message,
    News,
    Open,
    Ready,
    Refused,
    Report,
    Samples,
    Scrape,
    Stop,
    Turned,
    Up,
    ended,
    error_of,
)
from quire.errors import EngineDead, InvalidRequest, QuireError
from quire.log import logger
from quire.server.frontend import FAREWELL_S
from quire.server.settings import ServerSettings

ENTRY = "quire.server.worker"
MAX_DEATHS, DEATHS_WITHIN_S = 5, 60.0  # of the workers at one place
BACKOFF_S = 0.1  # before the second death's replacement; then twice as long each time
COLLECT_S = 1.0  # for workers to tell their metrics; the last ones count of those that do not
WATCH_S, MOST_SILENCES = 2.0, 10  # a worker that does not answer so many times in a row hangs
PATIENCE_S = FAREWELL_S + 3.0  # for workers to end by themselves


class Worker:
    """One frontend process; to the keeper, whose requests it sends."""

    def __init__(
        self, number: int, sock: socket.socket, heard: Callable[["Worker", Sequence[Message]], None]
    ):
        self.number, self.pid, self.num_silences = number, 0, 0
        self.link = Link(sock, partial(heard, self), incoming=FromWorker)
        loop = asyncio.get_running_loop()
        self.up: asyncio.Future[Up] = loop.create_future()
        self.drained: asyncio.Future[None] = loop.create_future()
        self.reports: dict[int, asyncio.Future[None]] = {}  # asked for
        self.report: Report | None = None  # the latest

    def heard(self, events: Sequence[TokenEvent]) -> None:
        """See `Client`."""
        self.send(News(list(events)))

    def failed(self, name: str, error: QuireError) -> None:
        """See `Client`."""
        self.send(ended(name, error))

    def send(self, message: Message) -> None:
        """Say something; nothing happens if the process is gone."""
        self.link.send(message)

    @property
    def serves(self) -> bool:
        return self.up.done() and not self.link.closed.done()


class Cradle:
    """Starts workers: forks of a process that has loaded the server's modules, which takes milliseconds."""

    def __init__(self, config: Config, settings: ServerSettings):
        options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        self.opening = Open("", options, msgspec.to_builtins(settings))
        self.numbers = itertools.count(1)
        self.nursery: Nursery | None = None
        self.forking = asyncio.Lock()  # a nursery answers one at a time

    async def launch(
        self, listener: socket.socket, heard: Callable[[Worker, Sequence[Message]], None]
    ) -> Worker:
        """A worker that has been told what to serve, and where.

        Raises:
            EngineDead: no process can be started.
        """
        async with self.forking:
            if self.nursery is not None and self.nursery.closed:
                self.nursery.close()
                self.nursery = None
            if self.nursery is None:
                self.nursery = Nursery(ENTRY)
            ours, theirs = socket.socketpair()
            with theirs:
                socket.send_fds(ours, [b"l"], [listener.fileno()])
                worker = Worker(next(self.numbers), ours, heard)
                await worker.link.connect()
                try:
                    worker.pid = await self.nursery.fork(theirs)
                except BaseException:
                    worker.link.close()
                    raise
        worker.send(msgspec.structs.replace(self.opening, prefix=f"{worker.number}-"))
        return worker

    async def bury(self, worker: Worker) -> str:
        """Make sure that a worker is gone; say how it ended."""
        if self.nursery is None:
            return "its parent is gone"
        self.nursery.kill(worker.pid)
        return ending(await self.nursery.death(worker.pid))

    def close(self) -> None:
        """End all of them."""
        if self.nursery is not None:
            self.nursery.close()
            self.nursery = None


class Workers:
    """All frontends of one port. All calls come from one event loop.

    Attributes:
        failure: done, with an error, when they cannot be kept running.
        facts: what the engine found out; there once it has started.
        chat: see `InputProcessor.chat`, once `start` has returned.
    """

    def __init__(
        self,
        keeper: Keepers,
        config: Config,
        settings: ServerSettings,
        listeners: Sequence[socket.socket],
        *,
        watch_s: float = WATCH_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.keeper, self.clock, self.listeners = keeper, clock, listeners
        self.cradle = Cradle(config, settings)
        self.workers: dict[int, Worker] = {}  # by number
        self.buried: list[Samples] = []  # what those counted that are gone
        self.numbers = itertools.count(1)
        self.facts: Facts | None = None
        self.chat: str | None = None
        self.started = False
        self.watch_s = watch_s
        self.stopping = False
        self.changed = asyncio.Event()  # a worker serves, or is gone
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start the engine and the workers, at once.

        Raises:
            ConfigError, ModelError, CapacityError: the model cannot be served as asked.
            EngineDead: the engine or a worker died while it started.
        """
        for task in (self._spread(), self._watch(), *map(self._place, self.listeners)):
            self._spawn(task)
        starting = asyncio.create_task(self._start())
        try:
            await asyncio.wait([starting, self.failure], return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                self.failure.result()
            await starting
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new work everywhere, let the old end."""
        self.stopping = True
        ends = []
        for worker in self.workers.values():
            if worker.serves:
                worker.send(Drain(timeout_s))
                ends.append(_either(worker.drained, worker.link.closed))
        if ends:
            await asyncio.wait([asyncio.ensure_future(end) for end in ends], timeout=timeout_s + PATIENCE_S)

    async def close(self, *, at_once: bool) -> None:
        """End every worker; leaves no process and no socket."""
        self.stopping = True
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        links = [worker.link for worker in self.workers.values()]
        if links and not at_once:
            for worker in self.workers.values():
                worker.send(Stop())
            await asyncio.wait([link.closed for link in links], timeout=PATIENCE_S)
        self.cradle.close()
        for link in links:
            link.close()
        if not self.failure.done():
            self.failure.cancel()

    async def scrape(self) -> tuple[list[Samples], int]:
        """Everybody's metrics as one, and how many calls wait for the engine."""
        number, asked = next(self.numbers), []
        for worker in self.workers.values():
            if worker.serves:
                worker.reports[number] = asyncio.get_running_loop().create_future()
                asked.append(worker.reports[number])
                worker.send(Collect(number))
        if asked:
            await asyncio.wait(asked, timeout=COLLECT_S)
        reports = []
        for worker in self.workers.values():
            worker.reports.pop(number, None)
            reports += [worker.report] if worker.report is not None else []
        own = samples_of(self.keeper.metrics.registry)
        metrics = merged(own, [self.buried, *(report.metrics for report in reports)])
        return metrics, sum(report.num_calls for report in reports)

    async def _start(self) -> None:
        self.facts = await self.keeper.start()
        for worker in self.workers.values():
            worker.send(Ready(self.facts))
        while True:
            serving = [worker for worker in self.workers.values() if worker.serves]
            if len(serving) == len(self.listeners):
                break
            self.changed.clear()
            await self.changed.wait()
        self.chat, self.started = serving[0].up.result().chat, True

    async def _place(self, listener: socket.socket) -> None:
        """Keep one worker running. Connections that come while there is none wait for the next."""
        deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        while not self.stopping:
            try:
                how = await self._life(listener)
            except EngineDead as error:
                how = str(error)
            if self.stopping:
                break
            now = self.clock()
            deaths.append(now)
            recent = sum(now - death < DEATHS_WITHIN_S for death in deaths)
            if recent == MAX_DEATHS:
                what = (
                    f"frontends died {recent} times within {DEATHS_WITHIN_S:g} s ({how}); see the log for why"
                )
                logger.error("%s", what)
                self._fail(EngineDead(what))
                break
            logger.error("a frontend is gone (%s); starting another one", how)
            await asyncio.sleep(BACKOFF_S * (2**recent - 2))

    async def _life(self, listener: socket.socket) -> str:
        """Start a worker and wait for its end, however that is; says how it ended."""
        worker = await self.cradle.launch(listener, self._heard)
        self.workers[worker.number] = worker
        if self.facts is not None:
            worker.send(Ready(self.facts))
            worker.send(self._turned())
        await asyncio.shield(worker.link.closed)  # which others wait for too, when this task is cancelled
        self.keeper.forget(worker)
        del self.workers[worker.number]
        if worker.report is not None:
            self.buried = merged([], [self.buried, kept(worker.report.metrics)])
        self.changed.set()
        return await self.cradle.bury(worker)

    async def _spread(self) -> None:
        """Tell all workers how the engine is."""
        while True:
            await self.keeper.changed.wait()
            self.keeper.changed.clear()
            if self.facts is not None or self.keeper.status is Status.DEAD:
                for worker in self.workers.values():
                    worker.send(self._turned())

    async def _watch(self) -> None:
        """Let go of workers that hang, and remember what the others counted, for when they are gone."""
        while True:
            await asyncio.sleep(self.watch_s)
            for worker in self.workers.values():
                if worker.serves:
                    worker.num_silences += 1
                    worker.send(Collect(0))
                    if worker.num_silences > MOST_SILENCES:
                        logger.error("frontend process %d does not answer", worker.pid)
                        worker.link.close()

    def _heard(self, worker: Worker, messages: Sequence[Message]) -> None:
        for message in messages:
            match message:
                case Add(submission):
                    self.keeper.add(submission, worker)
                case Abort(name, index):
                    self.keeper.abort(name, index)
                case Refused(name, text):  # a message of it could not be read
                    worker.failed(name, InvalidRequest(text))
                case Report(number):
                    worker.report, worker.num_silences = message, 0
                    if number in worker.reports:
                        worker.reports[number].set_result(None)
                case Scrape(number):
                    self._spawn(self._answer(worker, number))
                case Up():
                    worker.up.set_result(message)
                    self.changed.set()
                case Drained():
                    worker.drained.set_result(None)
                case Failed(kind, text) if not self.started:
                    self._fail(error_of(kind, text))
                case Failed(_, text):  # a file has changed since the others started; it ends by itself
                    logger.error("a frontend cannot start: %s", text)

    async def _answer(self, worker: Worker, number: int) -> None:
        metrics, num_calls = await self.scrape()
        worker.send(Report(number, metrics, num_calls))

    def _turned(self) -> Turned:
        dead = self.keeper.dead
        return Turned(self.keeper.status.value, None if dead is None else str(dead))

    def _fail(self, error: QuireError) -> None:
        self.stopping = True
        if not self.failure.done():
            self.failure.set_exception(error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


async def _either(*futures: "asyncio.Future[None]") -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
