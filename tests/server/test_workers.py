"""Several frontend processes at one port: they share an engine that may die, and one may die without the others."""

import asyncio
import json
import os
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from quire.config import Config
from quire.engine.keeper import Keeper
from quire.engine.metrics import Metrics
from quire.engine.supervisor import GROUP
from quire.errors import ConfigError, EngineDead
from quire.server.run import listen_several
from quire.server.settings import ServerSettings
from quire.server.workers import WATCH_S, Workers
from tests.engine.faulty_group import DIES
from tests.server.conftest import FRANCE, PARIS
from tests.server.served import COMMAND, OPTIONS, gone, interrupted_at_once, serve

CONFIG = Config(
    model="demo", device="cpu", num_threads=1, kv_cache_memory_bytes=2**24, disable_log_stats=True
)
FAULTY = "tests.engine.faulty_group"
NUM_STREAMS = 16

pytestmark = pytest.mark.slow  # each of them starts four processes


@dataclass
class Site:
    """Two workers and their keeper, which are this process's, and a client."""

    keeper: Keeper
    workers: Workers
    client: httpx.AsyncClient
    seen: asyncio.Event = field(default_factory=asyncio.Event)  # a piece of a stream came
    pieces: Counter[int] = field(default_factory=Counter)  # by stream

    async def stream(self, number: int, max_tokens: int = 200) -> list[int]:
        """The tokens of a greedy stream."""
        body = {
            "prompt": f"Tell me about number {number}, please.",
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        tokens: list[int] = []
        async with self.client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    tokens += event["choices"][0].get("token_ids") or []
                    self.pieces[number] += 1
                    self.seen.set()
        return tokens

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds that streams or workers bring about."""
        while not holds():
            self.seen.clear()
            self.workers.changed.clear()
            events = [asyncio.create_task(event.wait()) for event in (self.seen, self.workers.changed)]
            await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED, timeout=0.1)
            for task in events:
                task.cancel()

    def shares(self) -> Counter[int]:
        """Open requests by the worker that they came through."""
        return Counter(int(name.split("-")[0]) for name in self.keeper.clients)

    async def streams(self) -> list[asyncio.Task[list[int]]]:
        """Streams that run through both workers by now."""
        self.pieces.clear()
        tasks = [asyncio.create_task(self.stream(number)) for number in range(NUM_STREAMS)]
        await self.until(lambda: len(self.pieces) == NUM_STREAMS)
        assert len(self.shares()) == 2, "one worker took all connections"
        return tasks

    async def metrics(self) -> dict[str, float]:
        text = (await self.client.get("/metrics")).text
        return {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if "le" not in sample.labels and "finished_reason" not in sample.labels
        }


@asynccontextmanager
async def running(entry: str = GROUP, watch_s: float = WATCH_S, **options: object) -> AsyncIterator[Site]:
    """Two workers and an engine; `options` are the server's."""
    settings = ServerSettings(
        **{
            "port": 0,
            "served_model_name": ("demo",),
            "api_server_count": 2,
            "disable_access_log": True,
            **options,
        }
    )
    keeper = Keeper(CONFIG, Metrics("demo", log_stats=False), entry=entry)
    with ExitStack() as opened:
        listeners = [opened.enter_context(listener) for listener in listen_several(settings)]
        url = f"http://127.0.0.1:{listeners[0].getsockname()[1]}"
        workers = Workers(keeper, CONFIG, settings, listeners, watch_s=watch_s)
        try:
            await workers.start()
            alone = httpx.Limits(
                max_keepalive_connections=0
            )  # each request comes over a connection of its own
            async with httpx.AsyncClient(base_url=url, timeout=60, limits=alone) as client:
                yield Site(keeper, workers, client)
        finally:
            await workers.close(at_once=False)
            keeper.close(EngineDead("the test is over"))


def in_a_loop(work: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """A test that runs in an event loop, with an end to waiting."""

    def run() -> None:
        asyncio.run(asyncio.wait_for(work(), 120))

    run.__name__, run.__doc__ = work.__name__, work.__doc__
    return run


@in_a_loop
async def test_both_serve_and_a_scrape_shows_the_sum() -> None:
    async with running() as site:
        body = {"messages": FRANCE, "temperature": 0}
        answer = (await site.client.post("/v1/chat/completions", json=body)).json()
        assert answer["choices"][0]["message"]["content"] == PARIS
        tasks = await site.streams()
        load = (await site.client.get("/load")).json()["server_load"]
        assert load >= NUM_STREAMS - sum(task.done() for task in tasks)
        assert [len(await task) for task in tasks] == [200] * NUM_STREAMS
        counted = await site.metrics()
        want = answer["usage"]["completion_tokens"] + 200 * NUM_STREAMS
        assert counted["vllm:generation_tokens_total"] == want
        assert counted["vllm:e2e_request_latency_seconds_count"] == 1 + NUM_STREAMS
        assert counted["vllm:num_requests_running"] == 0 and counted["quire:engine_restarts_total"] == 0
        assert (await site.client.get("/load")).json() == {"server_load": 0}


@in_a_loop
async def test_the_engine_dies_under_streams_of_both() -> None:
    async with running() as site:
        want = await asyncio.gather(*await site.streams())
        tasks = await site.streams()
        os.kill(site.keeper.supervisor.pid, signal.SIGKILL)
        assert await asyncio.gather(*tasks) == want
        assert site.keeper.num_restarts == 1 and site.keeper.num_replayed > 0
        assert (await site.metrics())["quire:engine_restarts_total"] == 1


@in_a_loop
async def test_a_worker_dies_and_the_other_goes_on() -> None:
    async with running() as site:
        want = await asyncio.gather(*await site.streams())
        before = await site.metrics()
        tasks, shares = await site.streams(), site.shares()
        victim = next(iter(shares))
        os.kill(site.workers.workers[victim].pid, signal.SIGKILL)
        await site.until(lambda: victim not in site.workers.workers)
        assert victim not in site.shares()  # nobody computes for it any more
        results = await asyncio.gather(*tasks, return_exceptions=True)
        lost = [r for r in results if isinstance(r, BaseException)]
        assert len(lost) == shares[victim] and all(isinstance(r, httpx.TransportError) for r in lost)
        assert all(got == right for got, right in zip(results, want, strict=True) if got not in lost)
        await site.until(lambda: sum(w.serves for w in site.workers.workers.values()) == 2)
        assert await asyncio.gather(*await site.streams()) == want
        assert site.keeper.metrics.totals.used_blocks == 0 and not site.keeper.clients
        after = await site.metrics()
        fewest = 200 * (2 * NUM_STREAMS - len(lost))  # what a worker counted after its last report is lost
        counted = "vllm:generation_tokens_total"
        assert after[counted] - before[counted] >= fewest
        assert site.keeper.num_restarts == 0


@in_a_loop
async def test_a_poison_through_one_fails_nobody_of_the_other() -> None:
    async with running(FAULTY) as site:
        want = await asyncio.gather(*await site.streams())
        tasks = await site.streams()
        poison = {"prompt": "deadly", "max_tokens": 50, "ignore_eos": True, "logit_bias": {str(DIES): 0.003}}
        answer = await site.client.post("/v1/completions", json=poison)
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_crash"
        assert await asyncio.gather(*tasks) == want


@in_a_loop
async def test_workers_that_always_die_are_given_up() -> None:
    async with running() as site:
        failure, current = site.workers.failure, site.workers.workers
        while not failure.done():
            killed = list(current)
            for number in killed:
                os.kill(current[number].pid, signal.SIGKILL)
            await site.until(
                lambda lost=killed: failure.done() or len(current) == 2 and not {*lost} & {*current}  # type: ignore[misc]
            )
        assert isinstance(failure.exception(), EngineDead)


@in_a_loop
async def test_clients_that_leave_free_the_cache() -> None:
    async with running() as site:
        for task in await site.streams():
            task.cancel()
        await site.until(lambda: not site.keeper.clients)
        assert len(await site.stream(0)) == 200  # what was sent before it has been obeyed
        assert site.keeper.metrics.totals.used_blocks == site.keeper.metrics.totals.num_running == 0
        assert (await site.client.get("/load")).json() == {"server_load": 0}


@in_a_loop
async def test_a_worker_that_hangs_is_replaced() -> None:
    async with running(watch_s=0.1) as site:
        want = await asyncio.gather(*await site.streams())
        tasks, shares = await site.streams(), site.shares()
        victim = next(iter(shares))
        stopped = site.workers.workers[victim].pid
        os.kill(stopped, signal.SIGSTOP)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(r, httpx.TransportError) for r in results) <= shares[victim]
        assert all(got == right for got, right in zip(results, want, strict=True) if isinstance(got, list))
        await site.until(lambda: sum(w.serves for w in site.workers.workers.values()) == 2)
        assert victim not in site.workers.workers and not Path(f"/proc/{stopped}").exists()
        assert await asyncio.gather(*await site.streams()) == want


def test_a_file_that_is_broken_later_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The worker that needs it again starts once it is whole."""
    keys = tmp_path / "keys"
    keys.write_text("sesame\n")

    async def work() -> None:
        async with running(api_key_file=str(keys)) as site:
            current = site.workers.workers
            one, other = current
            keys.write_text("not a key, but words\n")
            os.kill(current[one].pid, signal.SIGKILL)
            await site.until(lambda: "a frontend cannot start" in caplog.text)
            assert other in current and not site.workers.failure.done()
            keys.write_text("sesame\n")
            await site.until(lambda: sum(worker.serves for worker in current.values()) == 2)

    asyncio.run(asyncio.wait_for(work(), 60))


@in_a_loop
async def test_nobody_else_gets_the_port() -> None:
    async with running() as site:
        settings = ServerSettings(port=site.client.base_url.port, api_server_count=2)
        with pytest.raises(ConfigError, match="Address already in use; another port"):
            listen_several(settings)


LONG = {"prompt": "Once upon a time", "max_tokens": 500, "ignore_eos": True, "stream": True}


@asynccontextmanager
async def streaming(url: str, count: int) -> AsyncIterator[list[asyncio.Task[str]]]:
    """Streams that have begun; each gives its last event."""
    begun: asyncio.Queue[None] = asyncio.Queue()

    async def one(client: httpx.AsyncClient) -> str:
        last = ""
        async with client.stream("POST", f"{url}/v1/completions", json=LONG) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    if not last:
                        begun.put_nowait(None)
                    last = line
        return last

    async with httpx.AsyncClient(timeout=60) as client:
        tasks = [asyncio.create_task(one(client)) for _ in range(count)]
        async with asyncio.timeout(60):
            for _ in tasks:
                await begun.get()
        yield tasks


@pytest.mark.parametrize("everybody", [False, True])
def test_a_signal_lets_all_streams_end(tmp_path: Path, everybody: bool) -> None:
    """A terminal sends it to all processes."""
    with serve(tmp_path / "log", "--api-server-count", "2") as served:
        family = served.family()

        async def work() -> None:
            async with streaming(served.url, 12) as tasks:
                for pid in family if everybody else family[:1]:
                    os.kill(pid, signal.SIGINT if everybody else signal.SIGTERM)
                async with httpx.AsyncClient() as client:
                    statuses = {200}
                    while statuses != {503}:  # the signal is being handled
                        answers = [client.get(f"{served.url}/readyz") for _ in range(8)]
                        statuses = {answer.status_code for answer in await asyncio.gather(*answers)}
                for event in await asyncio.gather(*tasks):
                    assert json.loads(event[6:])["choices"][0]["finish_reason"] == "length"

        asyncio.run(work())
        assert served.process.wait(60) == 0
        assert gone(family) and "Traceback" not in served.log.read_text()


def test_a_second_signal_stops_all_at_once(tmp_path: Path) -> None:
    with serve(tmp_path / "log", "--api-server-count", "2", "--drain-timeout", "600") as served:
        family = served.family()

        async def work() -> None:
            async with streaming(served.url, 4) as tasks:
                served.process.send_signal(signal.SIGTERM)
                async with httpx.AsyncClient() as client:
                    while (await client.get(f"{served.url}/readyz")).status_code == 200:
                        pass
                assert served.stop() == 130
                for result in await asyncio.gather(*tasks, return_exceptions=True):
                    assert isinstance(result, httpx.TransportError | str)

        asyncio.run(work())
        assert gone(family)


def test_nothing_outlives_the_main_process(tmp_path: Path) -> None:
    with serve(tmp_path / "log", "--api-server-count", "2") as served:
        family = served.family()
        assert len(family) == 6  # itself, two that start others, two workers, and the engine

        async def work() -> None:
            async with streaming(served.url, 4) as tasks:
                served.process.kill()
                await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(work())
        assert gone(family)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{served.url}/livez")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/no/such/folder"], "/no/such/folder"),
        (["demo", "--max-model-len", "4096"], "max_model_len"),
        (["demo", "--api-key-file", "/no/such/file"], "/no/such/file"),
        (["demo", "--ssl-certfile", "/no/such/file"], "No such file"),
        (["demo", "--api-server-count", "65"], "api_server_count is 65; it must be from 1 to 64"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(words: list[str], message: str) -> None:
    command = [*COMMAND, *OPTIONS, "--api-server-count", "2", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_signal_while_they_start(tmp_path: Path) -> None:
    """One that is up already answers."""
    assert interrupted_at_once(tmp_path / "log", "/livez", "--api-server-count", "2") == ("ok", 130)
    assert (tmp_path / "log").read_text() == ""
