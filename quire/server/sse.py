"""Server-sent events: chunks whose constant parts are written once, and the response that sends them."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quire.server.errors import ClientGone
from quire.server.limits import SEND_TIMEOUT_S

DONE = b"data: [DONE]\n\n"
T = TypeVar("T")

encode = msgspec.json.Encoder().encode


class Chunks:
    """The chunks of one stream. `envelope` is what all of them begin with (`id`, `object`, `created`, `model`)."""

    def __init__(self, envelope: Mapping[str, Any], *, usage: bool):
        """`usage`: whether the stream ends with usage; the chunks before have it as null then."""
        self._head = b"data: " + encode(envelope)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if usage else b"]}\n\n"
        self._parts: dict[int, tuple[bytes, bytes]] = {}

    def text(self, index: int, text: str, shape: Callable[[str], Mapping[str, Any]]) -> bytes:
        """News that are text only: most chunks. `shape` makes the choice's other keys from the text, once."""
        parts = self._parts.get(index)
        if parts is None:
            mark = "\0"  # written as \u0000, which nothing else in a choice is
            before, _, after = encode({"index": index, **shape(mark)}).partition(encode(mark))
            parts = self._parts[index] = self._head + before, after + self._tail
        return parts[0] + encode(text) + parts[1]

    def choice(self, choice: Mapping[str, Any], usage: Mapping[str, Any] | None = None) -> bytes:
        """Any chunk with one choice."""
        tail = self._tail if usage is None else b'],"usage":' + encode(usage) + b"}\n\n"
        return self._head + encode(choice) + tail

    def end(self, fields: Mapping[str, Any]) -> bytes:
        """The chunk at the end that has no choice, but usage or the like; `fields` are not empty."""
        return self._head + b"]," + encode(fields)[1:] + b"\n\n"


def event(value: Any) -> bytes:
    return b"data: " + encode(value) + b"\n\n"


def typed(value: Mapping[str, Any]) -> bytes:
    """An event with its type in a line of its own."""
    kind: str = value["type"]
    return b"event: " + kind.encode() + b"\n" + event(value)


class EventStream(Response):
    """Sends pieces as they come. The status waits for the first one, so that a refusal has its own."""

    media_type = "text/event-stream"

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        failed: Callable[[Exception], bytes],
        *,
        end: bytes,
        timeout_s: float,
        stall_s: float = SEND_TIMEOUT_S,
        late_headers: Callable[[], Mapping[str, str]] = dict,
    ):
        """`failed` writes what breaks a stream off, `end` ends every one.

        `timeout_s` is for everything, `stall_s` until the client takes a piece (or twice that).

        `late_headers` are those that the first piece tells.
        """
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.pieces, self.failed, self.end = pieces, failed, end
        self.timeout_s, self.stall_s, self.late_headers = timeout_s, stall_s, late_headers
        self.num_begun = self.num_sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGone):
            await unless_gone(self._send(send), gone(receive), self._stalled())

    async def _send(self, send: Send) -> None:
        async with aclosing(self.pieces) as pieces:
            try:
                async with asyncio.timeout(self.timeout_s):
                    first = await anext(pieces)
                    self.headers.update(self.late_headers())
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    await self._put(send, first)
                    async for piece in pieces:
                        await self._put(send, piece)
            except Exception as error:
                if not self.num_begun:
                    raise
                await self._put(send, self.failed(error))
        if self.end:
            await self._put(send, self.end)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _put(self, send: Send, piece: bytes) -> None:
        self.num_begun += 1
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        self.num_sent += 1

    async def _stalled(self) -> None:
        """Ends when the client has the connection open and reads nothing; one timer, not one for each piece."""
        seen = -1
        while not seen == self.num_sent < self.num_begun:
            seen = self.num_sent
            await asyncio.sleep(self.stall_s)


async def unless_gone(work: Coroutine[Any, Any, T], *watches: Coroutine[Any, Any, None]) -> T:
    """The result of `work`, which is cancelled as soon as one of the watches over the client ends.

    Raises:
        ClientGone: one did.
    """
    task = asyncio.ensure_future(work)
    tasks = [task, *(asyncio.ensure_future(watch) for watch in watches)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def answered(receive: Receive, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
    """The result of `work`, unless the client closes the connection or it takes too long.

    Raises:
        ClientGone, TimeoutError
    """
    async with asyncio.timeout(timeout_s):
        return await unless_gone(work, gone(receive))


async def gone(receive: Receive) -> None:
    """Wait until the client closes the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
