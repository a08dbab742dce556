"""What is done to servers under test, and what came of it: faults of the engine. Those of clients: `crowds.py`.

Each scenario has a server of its own in a folder of its own. What must hold whatever the numbers are is asserted here;
what a table shows is in the report.
"""

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from quire.engine.journal import BEYOND
from tests.faults.client import Answer, Body, Load, ask, compare, get, streams
from tests.faults.injection import Fault, marked
from tests.faults.server import Server, serving, until

SAME = {"ignore_eos": True, "return_token_ids": True, "temperature": 0}


@dataclass
class Report:
    """A row of the table. Requests that were to fail are neither lost nor wrong."""

    item: str
    what: str
    num_requests: int = 0
    num_lost: int = 0
    num_wrong: int = 0
    num_restarts: int = 0
    recoveries_s: list[float] = field(default_factory=list)
    note: str = ""

    def compare(self, got: Sequence[Answer], want: Sequence[Answer]) -> None:
        """Count what was lost, and what is not as it would have been without faults."""
        lost, wrong = compare(got, want)
        self.num_requests += len(got)
        self.num_lost += lost
        self.num_wrong += wrong

    @property
    def is_clean(self) -> bool:
        return self.num_requests > 0 and self.num_lost == self.num_wrong == 0


async def undisturbed(server: Server, bodies: Sequence[Body]) -> list[Answer]:
    """The answers without a fault."""
    answers = await Load(server.url, bodies).answers()
    assert all(answer.ok for answer in answers), [a for a in answers if not a.ok][:1]
    return answers


async def recover(server: Server, load: Load, act: Callable[[], None]) -> float:
    """Do away with the engine; seconds until another one has brought a token."""
    engines, began = server.board.get("engines"), time.monotonic()
    act()
    await until(lambda: server.board.get("engines") > engines)
    steps = server.board.get("steps")
    await until(lambda: server.board.get("steps") > steps or load.is_over)
    await load.tokens(load.num_tokens + 1)
    return time.monotonic() - began


def to_engine(server: Server, number: int) -> Callable[[], None]:
    return lambda: os.kill(server.board.get("pid"), number)


async def killed(
    folder: Path,
    *options: str,
    bodies: Sequence[Body],
    num_kills: int,
    seed: int = 0,
    is_right: Callable[[Answer], bool] = lambda _: True,
) -> Report:
    """SIGKILL of the engine at random points of many streams. `options`: more of the server's.

    Everybody gets beyond one kill before the next, or would be on trial then, as a suspect; so steps are slow enough
    for this process to see how far they are, even where others want its core.
    """
    report = Report("1", f"engine killed {num_kills} times under {len(bodies)} streams")
    async with serving(folder, *options, step_s=0.01) as server:
        want = await undisturbed(server, bodies)
        assert all(map(is_right, want))
        outputs = [tokens for answer in want for tokens in answer.tokens.values()]
        points = random.Random(seed).sample(range(1, sum(map(len, outputs)) * 3 // 4), num_kills)
        load, beyond = Load(server.url, bodies), 0
        for point in sorted(points):
            await load.tokens(max(point, beyond))
            assert not load.is_over
            report.recoveries_s.append(await recover(server, load, to_engine(server, signal.SIGKILL)))
            beyond = load.num_tokens + 2 * BEYOND * len(outputs)
        report.compare(await load.answers(), want)
        report.num_restarts = await server.num_restarts()
        assert report.num_restarts == num_kills
        await server.idle()
    return report


async def stopped(
    folder: Path, *options: str, num_streams: int, hang_s: float = 1.0, pause_s: float = 0.3
) -> Report:
    """SIGSTOP of the engine: silence without an end. The pause is so that the restart can be seen."""
    report = Report("3", f"engine stopped under {num_streams} streams, limit {hang_s:g} s")
    bodies = streams(num_streams)
    async with serving(folder, *options, hang_s=hang_s, other_starts_s=pause_s) as server:
        want = await undisturbed(server, bodies)
        load = Load(server.url, bodies)
        await load.tokens(num_streams * 20)
        lives: list[int] = []

        async def watch() -> None:
            while True:
                lives.append((await get(server.url, "/livez"))[0])
                await asyncio.sleep(0.005)

        watching = asyncio.create_task(watch())
        recovering = asyncio.create_task(recover(server, load, to_engine(server, signal.SIGSTOP)))
        began = time.monotonic()
        await server.readyz(503)
        detected_s = time.monotonic() - began
        report.recoveries_s.append(await recovering - detected_s - pause_s)
        await server.readyz(200)
        watching.cancel()
        assert detected_s >= hang_s and set(lives) == {200}
        report.compare(await load.answers(), want)
        report.num_restarts = await server.num_restarts()
        report.note = f"noticed after {detected_s:.1f} s; /livez 200, /readyz 503 meanwhile"
        await server.idle()
    return report


async def one_fails(
    folder: Path, bad: Sequence[Body], *options: str, num_streams: int, report: Report, **faults: object
) -> list[Answer]:
    """Marked requests amid others; returns what the marked ones got, after checking that traffic goes on."""
    bodies = streams(num_streams)
    async with serving(folder, *options, **faults) as server:
        want = await undisturbed(server, bodies)
        failed = await server.metric("vllm:request_success_total", finished_reason="error")
        load = Load(server.url, bodies)
        await load.tokens(num_streams * 10)
        got = await asyncio.gather(*(ask(server.url, body) for body in bad))
        assert not any(answer.ok for answer in got)
        assert not any(answer.broken for answer in got), "they are told"
        report.compare(await load.answers(), want)
        report.num_restarts = await server.num_restarts()
        failed = await server.metric("vllm:request_success_total", finished_reason="error") - failed
        assert failed == len(bad)
        report.compare(await undisturbed(server, bodies), want)  # later traffic
        assert await server.num_restarts() == report.num_restarts
        await server.idle()
    return list(got)


async def cannot_be_sampled(folder: Path, *, num_streams: int) -> Report:
    """An exception in one request's part of a step, at three places."""
    bias = {"logit_bias": {"7": 1.0}}
    report = Report("4", "exception in one request's sampling, logit bias or set-up")
    bad = [
        {**SAME, "prompt": marked(Fault.RAISES, 3)},
        {**SAME, "prompt": marked(Fault.BIAS, 2), "stream": True, "max_tokens": 40, **bias},
        {**SAME, "prompt": marked(Fault.SETUP)},
    ]
    got = await one_fails(folder, bad, num_streams=num_streams, report=report)
    assert [answer.status for answer in got] == [500, 200, 500], "a stream that has begun ends with an error"
    assert all(answer.error and answer.error["code"] == 500 for answer in got)
    assert report.num_restarts == 0
    report.note = "3 of 3 failed, nobody else"
    return report


async def not_a_number(folder: Path, *options: str, num_streams: int) -> Report:
    """NaN in one row of logits."""
    report = Report("6", "NaN in one row")
    bad = [{**SAME, "prompt": marked(Fault.NAN, 4)}]
    (got,) = await one_fails(folder, bad, *options, num_streams=num_streams, report=report)
    assert got.status == 500 and report.num_restarts == 0
    report.note = "this row failed, counted once"
    return report


async def poison(
    folder: Path,
    fault: Fault,
    at: int,
    *options: str,
    num_streams: int,
    stream: bool = False,
    hang_s: float = 10.0,
) -> Report:
    """A request whose steps end the process, or never end."""
    report = Report("5", f"poison: {fault.name.lower()} with {at} output tokens")
    bad = [{**SAME, "prompt": marked(fault, at), "stream": stream, "max_tokens": at + 20}]
    began = time.monotonic()
    (got,) = await one_fails(folder, bad, *options, num_streams=num_streams, report=report, hang_s=hang_s)
    assert got.status == (200 if stream and at else 500)
    assert got.error is not None and got.error["code"] == "engine_crash"
    assert report.num_restarts <= 3
    report.note = (
        f"only it failed, with engine_crash; {time.monotonic() - began:.1f} s with the server's start"
    )
    return report


async def always_dies(folder: Path, *options: str, num_streams: int) -> Report:
    """Engines that die at their first step, one after the other."""
    report = Report("17", "every engine dies at its first step")
    async with serving(folder, *options, dies_at_step=1) as server:
        load = Load(server.url, streams(num_streams))
        began = time.monotonic()
        await server.readyz(503)
        assert await server.exit_code() == 70
        seconds = time.monotonic() - began
        answers = await load.answers()
        report.num_restarts = server.board.get("engines") - 1
        report.num_requests = len(answers)
        report.num_lost = sum(answer.is_whole and answer.error is None for answer in answers)
        assert all(answer.status >= 500 or answer.error for answer in answers), "everybody is told"
        assert report.num_restarts == 5
        await server.gone()
    report.note = f"all were told; /readyz 503, exit code 70 after {seconds:.1f} s"
    return report
