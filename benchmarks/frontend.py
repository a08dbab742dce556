"""What the HTTP frontend costs: streamed tokens/s through one process, its CPU time, the delay that it adds.

The server is real, tokenizer and all; its engine group is `echo_group.py`, which computes nothing. The client is that
of `quire bench serve`, in this process. With `--engine`, the demo model over HTTP and without: how much HTTP adds.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import uvloop
from echo_group import TICK_S, clock_words
from profiler import sampled

from quire.cli.calls import Api, Question
from quire.cli.client import Client
from quire.cli.drive import Driver, Measured
from quire.cli.report import Timed, percentile
from quire.config import Config
from quire.engine.keeper import Keeper
from quire.engine.metrics import Metrics
from quire.engine.remote import RemoteEngine
from quire.engine.supervisor import GROUP
from quire.server.run import listen, listen_several, serve, serve_several
from quire.server.settings import ServerSettings
from quire.types import OutputKind, SamplingParams

ECHO = "echo_group"
WORKER = "quire.server.worker"
PROMPT = "Tell me everything that you know about the sea."
PACED = {1: 997, 64: 307, 512: 41}  # streams: tokens/s of each, not in step with the kernel's 250 Hz
NUM_SHORT = 2000  # requests of one token
DEMO_TOKENS = {1: 128, 64: 128, 512: 64}
CONFIG = Config(model="demo", device="cpu", disable_log_stats=True, max_num_seqs=512)

Served = tuple[int, list[int]]  # port of a server, and its processes without the engine's
Speeds = dict[str, tuple[float, float]]  # by number of streams: tokens/s, mean seconds to the end


def start_server(entry: str, processes: int, profile: bool) -> None:
    """The server, until SIGTERM; its port is the first line of its output."""
    settings = ServerSettings(
        port=0, served_model_name=("demo",), disable_access_log=True, api_server_count=processes
    )
    listeners = [listen(settings)] if processes == 1 else listen_several(settings)
    with ExitStack() as opened, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        port = [opened.enter_context(each) for each in listeners][0].getsockname()[1]
        with sampled(show=profile):
            if processes == 1:
                engine = RemoteEngine(CONFIG, entry=entry)
                runner.run(serve(engine, settings, listeners[0], lambda: say(port)))
            else:
                keeper = Keeper(CONFIG, Metrics("demo", log_stats=False), entry=entry)
                runner.run(serve_several(keeper, CONFIG, settings, listeners, lambda *_: say(port)))


def say(value: object) -> None:
    print(json.dumps(value), flush=True)


@contextmanager
def server(entry: str, *, processes: int = 1, profile: bool = False) -> Iterator[Served]:
    """A server in processes of its own."""
    options = ["--serve", entry, "--processes", str(processes), *(["--profile"] if profile else [])]
    with subprocess.Popen([sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield json.loads(process.stdout.readline()), [process.pid, *workers(process.pid)]
        finally:
            process.terminate()
            print(process.stdout.read(), end="")


def workers(pid: int) -> list[int]:
    """Processes below this one that serve HTTP."""
    children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    found = [child for child in children if WORKER in Path(f"/proc/{child}/cmdline").read_text()]
    return found + [below for child in found for below in workers(child)]


def cpu_s(pids: Iterable[int]) -> float:
    """Of all threads; exact, where /proc counts ticks. The numbers are those of clock_getcpuclockid(3) on Linux."""
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)


async def stream(
    port: int, streams: int, tokens: int, *, rate: int = 0, limit: int | None = None
) -> Measured:
    """Ask for `streams` times `tokens` tokens, at `rate` tokens/s each, at most `limit` requests at once."""
    extra = {"priority": rate, "temperature": 0.0}
    api = Api(chat=False, path="/v1/completions", model="demo", ignore_eos=True, extra=extra)
    async with Client(f"http://127.0.0.1:{port}") as client:
        driver = Driver(client=client, api=api, max_concurrency=limit, keep_text=True)
        run = await driver.measure([Question(PROMPT, 10, tokens)] * streams, [0.0] * streams, lambda: None)
    failed = [request.error for request in run.requests if request.error]
    if failed:
        raise SystemExit(f"{len(failed)} requests failed: {failed[0]}")
    return run


def delays(requests: Iterable[Timed], ticks: dict[str, int]) -> list[float]:
    """Milliseconds from the engine's clock to the client's, of each token, ascending."""
    cycle = len(ticks) * TICK_S
    return sorted(
        (time_s - ticks[f" {word}"] * TICK_S) % cycle * 1e3
        for request in requests
        for time_s, text in zip(request.times, request.texts, strict=False)
        for word in text.split()
    )


def echo_case(served: Served, ticks: dict[str, int], case: tuple[int, int, float]) -> dict[str, float]:
    """One run: streams, tokens/s of each (0: all that go), seconds."""
    (port, pids), (streams, rate, seconds) = served, case
    tokens = int((rate or 30_000 / streams) * seconds)
    before = cpu_s(pids)
    run = uvloop.run(stream(port, streams, tokens, rate=rate))
    used = cpu_s(pids) - before
    count = sum(request.output_len for request in run.requests)
    late = delays(run.requests, ticks)
    return {
        "speed": count / run.duration,
        "merged": count / sum(len(request.texts) for request in run.requests),
        "busy": used / run.duration,
        "us": used / count * 1e6,
        "p50": percentile(late, 50),
        "p99": percentile(late, 99),
    }


def echo(args: argparse.Namespace) -> None:
    ticks = {word: tick for tick, word in enumerate(clock_words("demo"))}
    with server(ECHO, processes=args.processes, profile=args.profile) as served:
        uvloop.run(stream(served[0], 64, 16))  # warm
        print_tokens(args, served, ticks)
        print_requests(args, served)


def print_tokens(args: argparse.Namespace, served: Served, ticks: dict[str, int]) -> None:
    print(
        "| streams | offered, tok/s | streamed, tok/s | tokens/chunk | CPU | CPU per token | delay p50 | p99 |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for streams in args.streams:
        for rate in (PACED.get(streams, 40), 0) if args.rate is None else args.rate:
            case = (streams, rate, args.seconds)
            runs = [echo_case(served, ticks, case) for _ in range(args.rounds)]
            best = min(runs, key=lambda run: run["us"])
            offered = f"{streams * rate:,}" if rate else "all"
            delay = [f"{best[p]:.1f} ms" if rate else "-" for p in ("p50", "p99")]
            print(
                f"| {streams} | {offered} | {best['speed']:,.0f} | {best['merged']:.1f}"
                f" | {100 * best['busy']:.0f} % | {best['us']:.1f} us | {' | '.join(delay)} |",
                flush=True,
            )


def print_requests(args: argparse.Namespace, served: Served) -> None:
    print("\n| requests of 1 token at once | requests/s | CPU per request | first token p50 | p99 |")
    print("|---|---|---|---|---|")
    for limit in (1, 64):
        runs = []
        for _ in range(args.rounds):
            before = cpu_s(served[1])
            run = uvloop.run(stream(served[0], NUM_SHORT, 1, limit=limit))
            runs.append((run.duration, cpu_s(served[1]) - before, sorted(r.ttft * 1e3 for r in run.requests)))
        duration, used, first = min(runs)
        print(
            f"| {limit} | {NUM_SHORT / duration:,.0f} | {used / NUM_SHORT * 1e6:,.0f} us"
            f" | {percentile(first, 50):.1f} ms | {percentile(first, 99):.1f} ms |",
            flush=True,
        )


async def without_http(cases: dict[int, int]) -> Speeds:
    """The same requests of the same engine process, without HTTP."""
    engine = RemoteEngine(CONFIG)
    await engine.start()

    async def ask(tokens: int) -> float:
        params = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, output_kind=OutputKind.DELTA
        )
        begin = time.perf_counter()
        async for _ in engine.generate(PROMPT, params):
            pass
        return time.perf_counter() - begin

    found: Speeds = {}
    try:
        await asyncio.gather(*(ask(8) for _ in range(8)))
        for streams, tokens in cases.items():
            begin = time.perf_counter()
            ends = await asyncio.gather(*(ask(tokens) for _ in range(streams)))
            found[str(streams)] = streams * tokens / (time.perf_counter() - begin), statistics.fmean(ends)
    finally:
        engine.shutdown()
    return found


def over_http(cases: dict[int, int]) -> Speeds:
    found: Speeds = {}
    with server(GROUP) as (port, _):
        uvloop.run(stream(port, 8, 8))
        for streams, tokens in cases.items():
            run = uvloop.run(stream(port, streams, tokens))
            mean = statistics.fmean(request.e2el for request in run.requests)
            found[str(streams)] = streams * tokens / run.duration, mean
    return found


def engine(args: argparse.Namespace) -> None:
    cases = {n: DEMO_TOKENS.get(n, 64) for n in args.streams}
    command = [sys.executable, __file__, "--direct", "--streams", *map(str, args.streams)]
    plain: list[dict[str, Any]] = []
    http: list[dict[str, Any]] = []
    for _ in range(args.rounds):  # in turn, so that other work on the machine meets both
        plain.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
        http.append(over_http(cases))
    print("| streams x tokens | engine, tok/s | over HTTP, tok/s | mean to the end | over HTTP | added |")
    print("|---|---|---|---|---|---|")
    for streams, tokens in cases.items():
        speed, mean = max(run[str(streams)] for run in plain)
        http_speed, http_mean = max(run[str(streams)] for run in http)
        print(
            f"| {streams} x {tokens} | {speed:,.0f} | {http_speed:,.0f} | {1e3 * mean:,.0f} ms"
            f" | {1e3 * http_mean:,.0f} ms | {100 * (http_mean / mean - 1):+.1f} % |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--rate", type=int, nargs="+", help="tokens/s of each stream; 0: all that go")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a run, about")
    parser.add_argument("--rounds", type=int, default=3, help="of which the best is shown")
    parser.add_argument("--processes", type=int, default=1, help="that serve HTTP")
    parser.add_argument("--engine", action="store_true", help="the demo model instead of the echo")
    parser.add_argument(
        "--profile", action="store_true", help="where the CPU time of the server's first process goes"
    )
    parser.add_argument("--serve", metavar="ENTRY", help=argparse.SUPPRESS)
    parser.add_argument("--direct", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        start_server(args.serve, args.processes, args.profile)
    elif args.direct:
        say(uvloop.run(without_http({n: DEMO_TOKENS.get(n, 64) for n in args.streams})))
    else:
        (engine if args.engine else echo)(args)


if __name__ == "__main__":
    main()
