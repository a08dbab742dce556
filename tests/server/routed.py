"""A router in a thread of its own, in front of servers that a test has."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import openai
import uvloop

from quire.server.router.settings import RouterSettings
from quire.server.router.site import RouterSite
from quire.server.run import listen


@dataclass
class Routed:
    """A running router."""

    url: str
    site: RouterSite
    loop: asyncio.AbstractEventLoop

    def post(self, path: str, **options: object) -> httpx.Response:
        return httpx.post(self.url + path, timeout=60, **options)

    def get(self, path: str, **options: object) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **options)

    def client(self) -> openai.OpenAI:
        http = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))  # leaves no socket
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, http_client=http)

    def poll(self) -> None:
        """Ask every replica now."""
        backends = self.site.forwarder.backends

        async def ask() -> None:
            await asyncio.gather(*(backend.poll() for backend in backends))

        asyncio.run_coroutine_threadsafe(ask(), self.loop).result(30)


@contextmanager
def routing(*urls: str, **options: object) -> Iterator[Routed]:
    settings = RouterSettings(**{"port": 0, "backend": urls, **options})
    loop, listener, ready = uvloop.new_event_loop(), listen(settings), threading.Event()
    found: list[RouterSite] = []
    stop = asyncio.Event()

    async def main() -> None:
        site = RouterSite(settings, listener)
        await site.start()
        found.append(site)
        ready.set()
        await stop.wait()
        await site.close(at_once=True)

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(main())

    thread = threading.Thread(target=run)
    with listener:
        thread.start()
        try:
            assert ready.wait(30)
            yield Routed(f"http://127.0.0.1:{listener.getsockname()[1]}", found[0], loop)
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join(30)
            assert not thread.is_alive()
