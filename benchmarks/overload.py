"""Ten times the load that a server can bear: what becomes of memory, of the requests that get in, and of the others.

`quire serve demo` with a bound on waiting; its capacity by as many requests at once as it computes; then requests that
arrive by chance at ten times that rate, whatever becomes of them; then one at a time, until all is as before. Options
that are not known here go to the server.
"""

import argparse
import asyncio
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvloop

from quire.cli.calls import Api, Question, call
from quire.cli.client import Client
from quire.cli.drive import Driver, Measured
from quire.cli.load import Load
from quire.cli.report import Timed, percentile

MIB = 1 << 20
PAGE_BYTES = 4096
SEATS = 16  # requests that the server computes at once
WORDS = (
    "the",
    "sea",
    "is",
    "deep",
    "and",
    "blue",
    "and",
    "full",
    "of",
    "fish",
    "that",
    "nobody",
    "has",
    "ever",
    "seen",
)
SETTLED = 2.0  # times the time to first token of an idle server


@dataclass(frozen=True)
class Overload:
    """A server under test. `wait_s`: how long it may let a request wait."""

    url: str
    pid: int
    wait_s: float
    output_len: int

    @property
    def api(self) -> Api:
        return Api(
            chat=False, path="/v1/completions", model="demo", ignore_eos=True, extra={"temperature": 0.0}
        )

    def questions(self, count: int, chance: random.Random) -> list[Question]:
        """Prompts that have nothing in common but words."""
        return [Question(" ".join(chance.choices(WORDS, k=32)), 0, self.output_len) for _ in range(count)]


@contextmanager
def server(options: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Address and process id."""
    command = [sys.executable, "-m", "quire.cli.main", "serve", "demo", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            for line in process.stdout:
                if found := re.search(r"http://\S+(?=/v1; try)", line):
                    yield found[0], process.pid
                    return
            raise SystemExit("the server did not start")
        finally:
            process.terminate()


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(below for child in children for below in tree(int(child)))]


def resident(pids: Sequence[int]) -> float:
    """MiB."""
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * PAGE_BYTES / MIB


async def drive(
    test: Overload, client: Client, questions: list[Question], arrivals: list[float], limit: int | None
) -> Measured:
    driver = Driver(client=client, api=test.api, max_concurrency=limit, keep_text=False)
    return await driver.measure(questions, arrivals, lambda: None)


async def capacity(test: Overload, client: Client, seconds: float) -> float:
    """Requests per second, with as many at once as the server computes; of the time when all were."""
    count, chance = 4 * SEATS, random.Random(1)
    while True:
        run = await drive(test, client, test.questions(count, chance), [0.0] * count, 2 * SEATS)
        if run.duration >= seconds:
            break
        count = int(count * max(1.3, 1.2 * seconds / run.duration))
    ends = sorted(request.end for request in run.requests if not request.error)
    full = ends[SEATS : -2 * SEATS]
    return (len(full) - 1) / (full[-1] - full[0])


async def idle_ttft(test: Overload, client: Client) -> float:
    chance = random.Random(2)
    calls = [await call(client, test.api, question) for question in test.questions(10, chance)]
    return percentile(sorted(timed.ttft for timed in calls), 50)


async def recovery(test: Overload, client: Client, usual_s: float) -> float:
    """Seconds until a request is answered about as soon as by an idle server."""
    begin, chance = time.perf_counter(), random.Random(3)
    while time.perf_counter() - begin < 60:
        asked = time.perf_counter()
        timed = await call(client, test.api, test.questions(1, chance)[0])
        if not timed.error and timed.ttft <= SETTLED * usual_s:
            return asked - begin
    return float("inf")


async def watched(pids: Sequence[int], found: list[float]) -> None:
    """Memory, once a second."""
    while True:
        found.append(resident(pids))
        await asyncio.sleep(1)


async def measure(test: Overload, factor: float, seconds: float) -> None:
    pids = tree(test.pid)
    async with Client(test.url) as client:
        usual_s = await idle_ttft(test, client)
        able = await capacity(test, client, min(10.0, seconds / 3))
        rate, chance, memory = factor * able, random.Random(4), list[float]()
        count = int(rate * seconds)
        questions = test.questions(count, chance)
        arrivals = Load(rate=rate).arrivals(count, chance)
        print(f"capacity {able:.1f} requests/s, offered {rate:.0f}/s for {seconds:.0f} s", file=sys.stderr)
        watch = asyncio.create_task(watched(pids, memory))
        loading = asyncio.create_task(drive(test, client, questions, arrivals, None))
        await asyncio.sleep(arrivals[-1])
        again = asyncio.create_task(recovery(test, client, usual_s))
        run, again_s = await loading, await again
        watch.cancel()
        report(test, run, able, arrivals[-1], memory)
        print(f"| time to first token of an idle server | {1e3 * usual_s:.0f} ms |")
        print(f"| seconds after the load until it is below {SETTLED:.0f} times that | {again_s:.1f} |")


def report(test: Overload, run: Measured, able: float, seconds: float, memory: list[float]) -> None:
    done = [request for request in run.requests if not request.error]
    refused = [request for request in run.requests if request.refused]
    failed = [request for request in run.requests if request.error and not request.refused]
    first = sorted(request.ttft for request in done)
    until = run.begin + seconds
    good = sum(request.ttft <= test.wait_s and request.end <= until for request in done)
    mute = sum(not request.retry_after.isdecimal() for request in refused)
    waits = sorted(int(request.retry_after) for request in refused if request.retry_after.isdecimal())
    late = sum(value > test.wait_s for value in first)
    sooner = sorted(request.times[-1] if request.times else 0.0 for request in refused)  # no output, so none
    assert not any(sooner)
    total = len(run.requests)
    after = memory[min(5, len(memory) - 1) :]  # of the first seconds: queues fill
    rows = {
        "requests offered": f"{total:,} in {seconds:.0f} s ({total / seconds / able:.1f} times the capacity)",
        "answered": f"{len(done):,} ({100 * len(done) / total:.1f} %)",
        "refused with 429 or 503": f"{len(refused):,} ({100 * len(refused) / total:.1f} %)",
        "refused without Retry-After": str(mute),
        "Retry-After, least, median, most": ", ".join(f"{percentile(waits, p):.0f} s" for p in (0, 50, 100)),
        "failed otherwise": str(len(failed)),
        "first token of those answered, p50": f"{1e3 * percentile(first, 50):,.0f} ms",
        "p99": f"{1e3 * percentile(first, 99):,.0f} ms",
        f"later than {test.wait_s:g} s": f"{late} ({100 * late / max(1, len(first)):.1f} %)",
        "answered in time, requests/s": f"{good / seconds:.1f} of {able:.1f}: {100 * good / seconds / able:.0f} %",
        "memory of all processes, after 5 s, most, at the end": ", ".join(
            f"{value:.0f} MiB" for value in (after[0], max(after), after[-1])
        ),
        "the client was busy": f"{100 * run.busy:.0f} %",
    }
    print("| | |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value} |")
    for error in sorted({request.error for request in failed})[:5]:
        print(f"failed: {error}", file=sys.stderr)
    show_refusals(refused)


def show_refusals(refused: Sequence[Timed]) -> None:
    for error in sorted({re.sub(r"\d+", "N", request.error) for request in refused})[:5]:
        print(f"refused: {error}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--factor", type=float, default=10.0, help="times the capacity")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--wait", type=float, default=5.0, help="seconds that a request may wait")
    parser.add_argument("--output-len", type=int, default=128, help="tokens of an answer")
    args, rest = parser.parse_known_args()
    options = ["--max-num-seqs", str(SEATS), "--device", "cpu", "--num-threads", "1", "--disable-log-stats"]
    options += ["--max-queue-seconds", str(args.wait), "--disable-access-log"]
    options += ["--kv-cache-memory-bytes", "64M", *rest]  # soon full: what it fills later is no leak
    with server(options) as (url, pid):
        uvloop.run(measure(Overload(url, pid, args.wait, args.output_len), args.factor, args.seconds))


if __name__ == "__main__":
    main()
