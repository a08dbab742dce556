"""Sends a benchmark's requests when they are due, and no more at once than allowed. Knows no figures."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass

from quire.cli.calls import Api, Question, call
from quire.cli.client import Client
from quire.cli.report import Timed


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All requests of a run, in the order of their sending.

    Attributes:
        begin: of the clock that they were timed with, in seconds.
        duration: seconds until the last one ended.
        busy: share of that time which this process computed.
    """

    requests: list[Timed]
    begin: float
    duration: float
    busy: float


@dataclass(frozen=True, kw_only=True)
class Driver:
    """One way of asking one server. `max_concurrency`: requests at once; those above wait; None for any number."""

    client: Client
    api: Api
    max_concurrency: int | None
    keep_text: bool

    async def warm_up(self, question: Question, count: int) -> None:
        """Ask the same `count` times, whatever comes of it."""
        gate = self._gate()
        await asyncio.gather(*(self._call(question, 0.0, gate) for _ in range(count)))

    async def measure(
        self, questions: Sequence[Question], arrivals: Sequence[float], advance: Callable[[], None]
    ) -> Measured:
        """Ask each when it arrives, seconds after the beginning; `advance` is called as each one ends."""
        gate = self._gate()

        async def ask(question: Question, due: float) -> Timed:
            timed = await self._call(question, due, gate)
            advance()
            return timed

        tasks: list[asyncio.Task[Timed]] = []
        begin, computed = time.perf_counter(), time.process_time()
        async with asyncio.TaskGroup() as group:
            for question, arrival in zip(questions, arrivals, strict=True):
                while (wait := begin + arrival - time.perf_counter()) > 0:  # uvloop's timers count in ms
                    await asyncio.sleep(wait)
                tasks.append(group.create_task(ask(question, begin + arrival)))
        duration, computed = time.perf_counter() - begin, time.process_time() - computed
        requests = [task.result() for task in tasks]
        return Measured(requests=requests, begin=begin, duration=duration, busy=computed / duration)

    def _gate(self) -> AbstractAsyncContextManager[None]:
        return nullcontext() if self.max_concurrency is None else asyncio.Semaphore(self.max_concurrency)

    async def _call(self, question: Question, due: float, gate: AbstractAsyncContextManager[None]) -> Timed:
        async with gate:
            return await call(self.client, self.api, question, due=due, keep_text=self.keep_text)
