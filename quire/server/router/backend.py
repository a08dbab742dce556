"""One replica: connections to it, whether it takes requests, how busy it is. Knows no other replica."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus

import httpx

from quire.engine.router import Router, State
from quire.engine.service import Status
from quire.log import logger
from quire.server.load import HEADER, Load
from quire.server.router.ask import PIECE_TOKENS, Headers

CONNECT_S, WRITE_S, POLL_S = 5.0, 60.0, 5.0
KEPT_S = 2.0  # a connection that nothing is asked on; servers close theirs after 5 or more
MOST_SILENCES = 3  # polls without an answer, until a replica is down
MAX_ANSWER_BYTES = 64 << 10
NOT_FORWARDED = {b"host", b"content-length"}
TAKING = {Status.READY.value, Status.RESTARTING.value}


class Backend:
    """A replica by its number in the router.

    Args:
        key: that it is asked for its load with; empty if it needs none.
    """

    def __init__(self, url: str, number: int, router: Router, key: str):
        self.url, self.number, self.router = httpx.URL(url), number, router
        self.authorization = {"authorization": f"Bearer {key}"} if key else {}
        self.num_silences = 0
        self.client = _client()

    @asynccontextmanager
    async def answer(
        self, method: str, target: bytes, headers: Headers, body: bytes
    ) -> AsyncGenerator[httpx.Response, None]:
        """Send a request; its answer's headers have come, its body has not.

        Raises:
            httpx.TransportError: there was no connection, or it broke.
        """
        kept = [pair for pair in headers if pair[0].lower() not in NOT_FORWARDED]
        url = self.url.copy_with(raw_path=self.url.raw_path.rstrip(b"/") + target)
        request = httpx.Request(method, url, headers=kept, content=body, extensions=_timeouts(None))
        response = await self.client.send(request, stream=True)
        try:
            yield response
        finally:
            await response.aclose()

    async def poll(self) -> None:
        """Ask whether it takes requests, and how busy it is."""
        try:
            status, text = await self._get(b"/readyz")
        except httpx.HTTPError as error:
            self.num_silences += 1
            refused = isinstance(error, httpx.ConnectError)  # nobody listens: there is nothing to wait for
            if refused or self.num_silences >= MOST_SILENCES:
                await self._turned(State.DOWN)
            return
        self.num_silences = 0
        refusing = status == HTTPStatus.SERVICE_UNAVAILABLE and text not in TAKING
        await self._turned(State.DRAINING if refusing else State.UP)
        if not refusing:
            with suppress(httpx.HTTPError):
                await self._get(b"/load")

    def heard(self, response: httpx.Response) -> None:
        """Take in what an answer says of the replica's load."""
        load = Load.parse(response.headers.get(HEADER, ""))
        if load is not None:
            pieces = load.kv_tokens // PIECE_TOKENS
            self.router.reported(self.number, load.queued_tokens, load.running, pieces)

    async def close(self) -> None:
        await self.client.aclose()

    async def _get(self, path: bytes) -> tuple[int, str]:
        url = self.url.copy_with(raw_path=self.url.raw_path.rstrip(b"/") + path)
        request = httpx.Request("GET", url, headers=self.authorization, extensions=_timeouts(POLL_S))
        response = await self.client.send(request, stream=True)
        try:
            self.heard(response)
            found = b""
            async for piece in response.aiter_raw():
                found += piece
                if len(found) > MAX_ANSWER_BYTES:
                    break
        finally:
            await response.aclose()
        return response.status_code, found.decode("latin-1")

    async def _turned(self, state: State) -> None:
        was = self.router.replicas[self.number].state
        self.router.turned(self.number, state)
        if state is was:
            return
        logger.warning("replica %s is %s", self.url, state.value)
        if state is State.DOWN:  # whoever waits for it waits no longer
            old, self.client = self.client, _client()
            await old.aclose()


def _client() -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256, keepalive_expiry=KEPT_S)
    return httpx.AsyncClient(limits=limits, trust_env=False)


def _timeouts(read_s: float | None) -> dict[str, dict[str, float | None]]:
    """An answer may take as long as the request's own time is; whether the replica hangs, polls tell."""
    return {"timeout": {"connect": CONNECT_S, "write": WRITE_S, "read": read_s, "pool": None}}
