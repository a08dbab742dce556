"""One request through the router: to a replica, to the next if that fails, and its answer to the client.

Before the client has anything, a failure means that another replica is asked: at most two, and after an answer of 5xx
or without a connection only by a tenth of all requests. Later, a stream of Quire's goes on at another replica, with the
tokens that the client has; other answers break off, streams with an error event.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from http import HTTPStatus
from typing import Protocol

import httpx
from starlette.types import Send

from quire.engine.router import Router, Ticket
from quire.errors import Overloaded
from quire.log import logger
from quire.server.errors import ApiError, ClientGone
from quire.server.limits import SEND_TIMEOUT_S
from quire.server.resume import ASKED
from quire.server.router.ask import Ask, Headers, passed_on
from quire.server.router.backend import Backend
from quire.server.router.counts import Counts
from quire.server.router.cut import Cut
from quire.server.sse import DONE, event, typed

MOST_RETRIES = 2
RETRIED = {500, 502, 503, 529}  # not 501 and 504: elsewhere it would be the same
VERDICT = b'"engine_crash"'  # in a 500: the request kills engines
WHOLE_BYTES = 1 << 20  # of an answer that is read completely before any of it is sent
WAIT_S, WAIT_STEP_S = 30.0, 0.2  # for a replica, when a stream has begun
NOT_FOR_CLIENTS = {b"x-request-id", ASKED.encode(), b"date", b"server"}


class Fleet(Protocol):
    """What a relay needs of the router around it."""

    router: Router
    backends: Sequence[Backend]
    counts: Counts


class Failure(Exception):
    """A replica did not serve a request. `free`: what it had begun, another may go on with at any time."""

    def __init__(self, how: str, *, free: bool = False):
        super().__init__(how)
        self.how, self.free = how, free


class Relay:
    """The way of one request."""

    def __init__(self, fleet: Fleet, ask: Ask, request_id: str, send: Send):
        self.fleet, self.ask, self._send = fleet, ask, send
        own = [pair for pair in ask.headers if pair[0].lower() != b"x-request-id"]
        self.headers = [*own, (b"x-request-id", request_id.encode())]
        asked = any(
            name.lower() == ASKED.encode() for name, _ in ask.headers
        )  # by a router in front of this one
        if ask.fields is not None and ask.is_stream and not asked and ask.fields.get("resume") is None:
            self.headers.append((ASKED.encode(), b"1"))
        self.started = False
        self.cut: Cut | None = None
        self.created = 0
        self.refusal: tuple[int, Headers, bytes] | None = None  # the latest, if nobody does better

    async def run(self, timeout_s: float) -> None:
        """Answer.

        Raises:
            Overloaded, ApiError, TimeoutError: nothing was sent.
            ClientGone: nobody reads any more.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._run()
        except (Overloaded, ApiError, TimeoutError) as error:
            if not self.started:
                raise
            late = isinstance(error, TimeoutError)
            await self._break_off("the request took longer than this router allows" if late else str(error))

    async def _run(self) -> None:
        tried: set[int] = set()
        num_retries = num_before = 0
        while True:
            try:
                ticket = await self._route(tried)
            except Overloaded:
                if self.refusal is None:
                    raise
                return await self._pass_on(*self.refusal)
            router, counts, name = self.fleet.router, self.fleet.counts, self._name(ticket)
            try:
                await self._attempt(ticket)
                counts.answers.number(name, "served").value += 1
                return None
            except Failure as failure:
                router.failed(ticket, time.monotonic())
                counts.answers.number(name, failure.how).value += 1
                logger.warning("replica %s: %s", name, failure.how)
                tried.add(ticket.replica)
                num_tokens = (
                    sum(len(choice.tokens) for choice in self.cut.choices.values()) if self.cut else 0
                )
                num_retries = 0 if num_tokens > num_before else num_retries  # it got on meanwhile
                num_before = num_tokens
                if not await self._goes_on(failure, num_retries):
                    return None
                num_retries += 1
            finally:
                router.ended(ticket)

    async def _goes_on(self, failure: Failure, num_retries: int) -> bool:
        """Whether another replica is to be asked; if not, the client is told."""
        counts, may = self.fleet.counts, num_retries < MOST_RETRIES
        if self.started:
            if may and self.cut is not None:
                self.cut.broken()
                counts.replays.value += 1
                return True
            await self._break_off("the replica that computed this is gone; send the request again")
            return False
        if may and (failure.free or self.fleet.router.may_retry()):
            counts.retries.value += 1
            return True
        if self.refusal is None:
            raise ApiError(502, "no replica could be reached", headers={"Retry-After": "1"})
        await self._pass_on(*self.refusal)
        return False

    async def _route(self, tried: set[int]) -> Ticket:
        """The best replica that was not tried; if a stream has begun, also one that was, and after a while."""
        router, ask, end = self.fleet.router, self.ask, time.monotonic() + WAIT_S
        while True:
            now = time.monotonic()
            try:
                return router.route(ask.chain, ask.num_tokens, now, session=ask.session, without=tried)
            except Overloaded:
                if not self.started or now > end:
                    raise
            tried.clear()
            await asyncio.sleep(WAIT_STEP_S)

    async def _attempt(self, ticket: Ticket) -> None:
        """Raises Failure: the replica did not serve the request, or not to its end."""
        ask, body = self.ask, self.ask.body
        if self.started and self.cut is not None and ask.fields is not None:
            body = self.cut.body(ask.fields, self.created)
        backend = self.fleet.backends[ticket.replica]
        try:
            async with backend.answer(ask.method, ask.target, self.headers, body) as response:
                backend.heard(response)
                if response.status_code in RETRIED or (
                    self.started and response.status_code != HTTPStatus.OK
                ):
                    await self._refused(response)
                    return
                self.fleet.router.succeeded(ticket)
                if response.headers.get("content-type", "").startswith("text/event-stream"):
                    await self._stream(ticket, response)
                else:
                    await self._whole(ticket, response)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Failure("unreachable") from error
        except (httpx.TransportError, httpx.StreamError) as error:
            raise Failure("broken", free=True) from error

    async def _refused(self, response: httpx.Response) -> None:
        """Pass on a verdict. Raises Failure: it is none, and another replica may do better."""
        body = b""
        async for piece in response.aiter_raw():
            body += piece
            if len(body) > WHOLE_BYTES:
                break
        self.refusal = (response.status_code, response.headers.raw, body)
        if self.started or VERDICT not in body:
            raise Failure("refused")
        await self._pass_on(*self.refusal)

    async def _stream(self, ticket: Ticket, response: httpx.Response) -> None:
        router, pieces = self.fleet.router, response.aiter_raw()
        if ASKED in response.headers and "content-encoding" not in response.headers:
            if self.cut is None:
                self.cut, self.created = Cut(), int(response.headers[ASKED])
            pieces = self._whole_pieces(self.cut, pieces)
        async for piece in pieces:
            router.began(ticket, time.monotonic())
            await self._start(response.status_code, response.headers.raw)
            await self._put(piece)
        await self._start(response.status_code, response.headers.raw)
        await self._end()

    async def _whole_pieces(self, cut: Cut, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for data in pieces:
            if whole := cut.feed(data):
                yield whole
        if cut.given_up:
            raise Failure("broken", free=True)
        yield cut.rest()

    async def _whole(self, ticket: Ticket, response: httpx.Response) -> None:
        """An answer in one piece is sent when all of it is here, unless it is large."""
        loop, router, body = asyncio.get_running_loop(), self.fleet.router, b""
        due = loop.call_later(router.expected_s(ticket), lambda: router.began(ticket, 0.0, measured=False))
        try:
            async for piece in response.aiter_raw():
                body += piece
                if len(body) > WHOLE_BYTES:
                    await self._start(response.status_code, response.headers.raw)
                    await self._put(body)
                    body = b""
        finally:
            due.cancel()
        await self._pass_on(response.status_code, response.headers.raw, body)

    async def _pass_on(self, status: int, headers: Headers, body: bytes) -> None:
        await self._start(status, headers)
        await self._put(body)
        await self._end()

    async def _start(self, status: int, headers: Headers) -> None:
        if not self.started:
            kept = [(n.lower(), v) for n, v in passed_on(headers) if n.lower() not in NOT_FOR_CLIENTS]
            await self._send({"type": "http.response.start", "status": status, "headers": kept})
            self.started = True

    async def _put(self, piece: bytes) -> None:
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        except TimeoutError:
            raise ClientGone from None

    async def _end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _break_off(self, why: str) -> None:
        """Tell the client of a stream; to others the connection says it, which is closed."""
        self.fleet.counts.lost.value += 1
        if not self.ask.is_stream:
            raise ClientGone
        error = ApiError(HTTPStatus.SERVICE_UNAVAILABLE, why)
        body = error.body(self.ask.path)
        await self._put(typed(body) if "type" in body else event(body) + DONE)
        await self._end()

    def _name(self, ticket: Ticket) -> str:
        return self.fleet.router.replicas[ticket.replica].name
