"""Keeps an engine group running: starts it, notices that it died or hangs, starts it again. Knows no requests."""

import asyncio
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, cast

from quire.engine.link import Link
from quire.engine.nursery import Nursery
from quire.engine.wire import Facts, Failed, FromGroup, Launch, Message, Ping, Ready, Stop, error_of
from quire.errors import EngineDead, QuireError
from quire.log import logger

GROUP = "quire.engine.group"
HANG_S = 10.0  # without a word, before a group counts as hung
SLOW_STEPS = 20  # the same, in slowest steps so far
BUSY_SHARE, BUSY_FACTOR = 0.1, 30  # a group on a CPU that computes may be silent so much longer
MAX_RESTARTS, RESTARTS_WITHIN_S = 5, 600.0  # without progress
BACKOFF_S = 0.1  # before the second restart without progress; then twice as long each time
GRACE_S = 0.5  # for a group to end by itself
STACKS_S = 0.2  # for a hung group to write its stacks


class Owner(Protocol):
    """Whoever the group works for."""

    def heard(self, messages: Sequence[Message]) -> bool:
        """Take in what the group said; True if that was progress."""

    def lost(self) -> None:
        """The group is gone, and what it was sent with it."""

    def found(self) -> None:
        """There is a group again, and it knows nothing."""

    def gave_up(self, error: EngineDead) -> None:
        """There will be no group any more."""


class Supervisor:
    """One group, and whatever replaces it. All calls come from one event loop.

    Args:
        launch: what the group is told first; later ones get the options that the first resolved them to.
        hang_s: how long a group may be silent, unless its steps are slow.
        entry: a module whose `main(socket)` is the group's life.
    """

    def __init__(
        self,
        launch: Launch,
        owner: Owner,
        *,
        hang_s: float = HANG_S,
        entry: str = GROUP,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.launch, self.owner, self.hang_s, self.entry, self.clock = launch, owner, hang_s, entry, clock
        self.nursery: Nursery | None = None
        self.link: Link | None = None
        self.pid = 0
        self.ready: asyncio.Future[Facts] | None = None
        self.heard_s, self.asked_s, self.slowest_s = 0.0, 0.0, 0.0
        self.restarts: deque[float] = deque()
        self.num_restarts = 0
        self.watch: asyncio.Task[None] | None = None

    async def start(self) -> Facts:
        """Start the first group, and watch over it from then on.

        Raises:
            ConfigError, ModelError, CapacityError: the model cannot be served as asked.
            EngineDead: the group died while it started.
        """
        facts = await self._launch()
        adapting = {"kv_cache_memory_bytes": self.launch.options.get("kv_cache_memory_bytes")}
        options = {**facts.options, **adapting}  # so that a prompt that fitted goes on fitting
        self.launch = Launch(options, self.launch.group)
        self.watch = asyncio.create_task(self._run(), name="quire-supervisor")
        return facts

    def send(self, message: Message) -> None:
        """Say something to the group; lost if it is gone, which `Owner.lost` tells."""
        if self.link is not None:
            self.link.send(message)

    def replace(self) -> None:
        """End the group; another one follows as if it had died. That does not count as a failure of it."""
        self.restarts.clear()
        if self.link is not None:
            self.link.close()

    def kill(self) -> None:
        """Leave nothing behind, no process and no socket. A group between two steps has the time to end well."""
        if self.watch is not None:
            self.watch.cancel()
            self.watch = None
        if self.link is not None and self.nursery is not None:
            self.link.send(Stop())
            self.nursery.wait(self.pid, GRACE_S)
        if self.nursery is not None:
            self.nursery.close()
            self.nursery = None
        if self.link is not None:
            self.link.close()
            self.link = None

    async def _launch(self) -> Facts:
        if self.nursery is not None and self.nursery.closed:
            self.nursery.close()
            self.nursery = None
        if self.nursery is None:
            self.nursery = Nursery(self.entry)
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with theirs:
            link = Link(ours, self._heard, incoming=FromGroup)
            await link.connect()
            self.link = link
            try:
                self.pid = await self.nursery.fork(theirs)
            except EngineDead:
                self.link.close()
                raise
        self.ready, self.asked_s = loop.create_future(), 0.0
        self.link.send(self.launch)
        await asyncio.wait([self.ready, self.link.closed], return_when=asyncio.FIRST_COMPLETED)
        if self.ready.done() and self.ready.exception() is None:
            return self.ready.result()
        self.link.close()
        how = await self._bury()
        if self.ready.done():
            return self.ready.result()  # raises what the group said
        raise EngineDead(f"the engine died while it started ({how}); see the log")

    def _heard(self, messages: Sequence[Message]) -> None:
        now = self.clock()
        if self.heard_s < self.asked_s:
            self.slowest_s = max(self.slowest_s, min(now - self.asked_s, self.hang_s))
        self.heard_s = now
        if self.ready is not None and not self.ready.done() and messages:
            first, *messages = messages
            if isinstance(first, Ready):
                self.ready.set_result(first.facts)
            elif isinstance(first, Failed):
                self.ready.set_exception(error_of(first.kind, first.message))
        if messages and self.owner.heard(messages):
            self.restarts.clear()

    async def _run(self) -> None:
        """Watch, and start again, until nothing helps."""
        try:
            while True:
                why = await self._end()
                self.owner.lost()
                how = await self._bury()
                logger.error("the engine is gone (%s); starting it again", why or how)
                await self._restart()
                self.owner.found()
        except EngineDead as error:
            logger.error("%s", error)
            self.owner.gave_up(error)
        except Exception as error:
            logger.exception("the supervisor stopped")
            self.owner.gave_up(EngineDead(f"the engine stopped: {type(error).__name__}; see the log"))

    async def _end(self) -> str:
        """Wait until the group hangs, and say so, or is gone, which says nothing. Nothing comes from it after that."""
        link, cpu_s, number = cast(Link, self.link), list[float](), 0
        pids = [self.pid, *cast(asyncio.Future[Facts], self.ready).result().ranks]
        while True:
            if self.heard_s >= self.asked_s:  # it answered
                self.asked_s, cpu_s = self.clock(), list(map(_cpu_s, pids))
            link.send(Ping(number := number + 1))
            await asyncio.wait([link.closed], timeout=min(1.0, self.hang_s / 4))
            if link.closed.done():
                return ""
            silent_s = self.clock() - self.asked_s if self.heard_s < self.asked_s else 0.0
            least_s = min(now_s - then_s for now_s, then_s in zip(map(_cpu_s, pids), cpu_s, strict=True))
            busy = (
                self.launch.options["device"] == "cpu" and least_s > silent_s * BUSY_SHARE
            )  # all: none waits for another
            limit_s = max(self.hang_s, SLOW_STEPS * self.slowest_s) * (BUSY_FACTOR if busy else 1)
            if silent_s > limit_s:
                cast(Nursery, self.nursery).kill(self.pid, signal.SIGUSR1)  # its stacks, for the log
                await asyncio.wait([link.closed], timeout=STACKS_S)
                link.close()
                return f"no word for {silent_s:.1f} s"

    async def _bury(self) -> str:
        """Make sure that the group is gone, memory and all; say how it ended."""
        nursery = cast(Nursery, self.nursery)
        nursery.kill(self.pid)  # one that dies already keeps its own exit code
        return ending(await nursery.death(self.pid))

    async def _restart(self) -> None:
        while True:
            now = self.clock()
            self.restarts.append(now)
            while now - self.restarts[0] > RESTARTS_WITHIN_S:
                self.restarts.popleft()
            if len(self.restarts) > MAX_RESTARTS:
                raise EngineDead(
                    f"the engine died {len(self.restarts)} times without computing a token; see the log for why"
                )
            if len(self.restarts) > 1:
                await asyncio.sleep(BACKOFF_S * 2 ** (len(self.restarts) - 2))
            self.num_restarts += 1
            try:
                facts = await self._launch()
            except QuireError as error:
                logger.error("the engine does not start: %s", error)
                continue
            logger.info("the engine runs again after %.2f s", self.clock() - now)
            logger.debug("it started in %.2f s: %s", facts.start_s, facts.summary)
            return


def ending(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None:
        return "nobody knows how"
    return f"exit code {code}" if code >= 0 else f"killed by signal {-code}, {signal.strsignal(-code)}"


def _cpu_s(pid: int) -> float:
    """Seconds that a process has computed; 0 where nobody says."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
