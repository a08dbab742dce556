"""The demo model behind a live server on a loopback port, and clients of it."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import openai
import pytest
import uvloop

from quire import AsyncEngine, Config
from quire.engine.service import Service, Status
from quire.server.frontend import Frontend
from quire.server.http import http_server
from quire.server.run import listen
from quire.server.settings import ServerSettings
from tests.server.served import Served, serve

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
PARIS = "The capital of France is Paris."


class InProcess:
    """An engine of this process, whose status a test may set."""

    def __init__(self, engine: AsyncEngine):
        self.engine, self.status = engine, Status.READY
        self.inputs, self.metrics = engine.inputs, engine.metrics
        self.stream, self.abort = engine.stream, engine.abort

    def num_used_blocks(self) -> int:
        """When the engine has done all that was asked of it before."""
        seen = threading.Event()
        self.engine.commands.put(seen.set)
        assert seen.wait(30)
        return self.engine.engine.core.scheduler.pool.num_used


@dataclass
class Live:
    """A running server."""

    url: str
    front: Frontend
    loop: asyncio.AbstractEventLoop

    def client(self, key: str = "none") -> openai.OpenAI:
        http = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))  # leaves no socket
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, http_client=http)

    def async_client(self, key: str = "none") -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def post(self, path: str, **options: object) -> httpx.Response:
        return httpx.post(self.url + path, timeout=60, **options)

    def get(self, path: str, **options: object) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **options)

    def drain(self, timeout_s: float) -> "concurrent.futures.Future[None]":
        return asyncio.run_coroutine_threadsafe(self.front.drain(timeout_s), self.loop)

    def until_calls(self, number: int) -> None:
        """Wait until that many calls are in the engine."""
        waiting = self.front.until(lambda: self.front.num_calls == number)
        asyncio.run_coroutine_threadsafe(waiting, self.loop).result(30)


@contextmanager
def serving(service: Service, **options: object) -> Iterator[Live]:
    """A server in a thread of its own, at a free port."""
    settings = ServerSettings(**{"port": 0, "served_model_name": ("demo", "small"), **options})
    front = Frontend(service, settings)
    server, loop, listener = http_server(front), uvloop.new_event_loop(), listen(settings)

    def main() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(server.serve(sockets=[listener]))

    thread = threading.Thread(target=main)
    with listener:  # it has a queue of connections already
        thread.start()
        try:
            yield Live(f"http://127.0.0.1:{listener.getsockname()[1]}", front, loop)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(scope="session")
def service() -> Iterator[InProcess]:
    engine = AsyncEngine(
        Config(model="demo", device="cpu", disable_log_stats=True, kv_cache_memory_bytes=64 << 20)
    )
    yield InProcess(engine)
    engine.shutdown()


@pytest.fixture(scope="session")
def live(service: InProcess) -> Iterator[Live]:
    with serving(service) as live:
        yield live


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`quire serve demo`, the engine in a process of its own."""
    with serve(tmp_path_factory.mktemp("serve") / "log") as served:
        yield served
