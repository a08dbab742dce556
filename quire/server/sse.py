"""Server-sent events: chunks whose constant parts are written once, and the response that sends them."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quire.server.errors import ApiError, ClientGone
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

    def usage(self, usage: Mapping[str, Any]) -> bytes:
        """The chunk at the end that has no choice."""
        return self._head + b'],"usage":' + encode(usage) + b"}\n\n"


def event(value: Any) -> bytes:
    return b"data: " + encode(value) + b"\n\n"


class EventStream(Response):
    """Sends pieces as they come. The status waits for the first one, so that a refusal has its own."""

    media_type = "text/event-stream"

    def __init__(self, pieces: AsyncGenerator[bytes, None], explain: Callable[[Exception], ApiError]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.pieces, self.explain = pieces, explain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGone):
            await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async with aclosing(self.pieces) as pieces:
            first = await anext(pieces)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                await _put(send, first)
                async for piece in pieces:
                    await _put(send, piece)
            except ClientGone:
                raise
            except Exception as error:
                await _put(send, event(self.explain(error).body()))
        await _put(send, DONE)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _put(send: Send, piece: bytes) -> None:
    try:
        async with asyncio.timeout(SEND_TIMEOUT_S):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    except TimeoutError:  # it has the connection open and reads nothing
        raise ClientGone from None


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled as soon as the client closes the connection.

    Raises:
        ClientGone: it did.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
