"""Chunks written from parts equal chunks written whole."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from quire.server.errors import error_of
from quire.server.sse import DONE, Chunks, EventStream, event

ENVELOPE = {"id": 'a"\\', "object": "chunk", "created": 1, "model": "m\u0000"}


def shape(text: str) -> dict[str, Any]:
    return {"delta": {"content": text}, "logprobs": None}


def value(chunk: bytes) -> Any:
    assert chunk.startswith(b"data: ") and chunk.endswith(b"\n\n") and chunk.count(b"\n") == 2
    return json.loads(chunk[6:])


@given(st.lists(st.tuples(st.integers(0, 3), st.text()), max_size=8), st.booleans())
@settings(derandomize=True, deadline=None)
def test_parts_make_the_whole(news: list[tuple[int, str]], usage: bool) -> None:
    chunks = Chunks(ENVELOPE, usage=usage)
    for index, text in news:
        want = {
            **ENVELOPE,
            "choices": [{"index": index, **shape(text)}],
            **({"usage": None} if usage else {}),
        }
        assert value(chunks.text(index, text, shape)) == want
        assert value(chunks.choice({"index": index, **shape(text)})) == want


def test_usage_comes_with_a_choice_or_without() -> None:
    chunks, counts = Chunks(ENVELOPE, usage=True), {"prompt_tokens": 3}
    assert value(chunks.end({"usage": counts})) == {**ENVELOPE, "choices": [], "usage": counts}
    assert value(chunks.choice({"index": 0}, counts)) == {
        **ENVELOPE,
        "choices": [{"index": 0}],
        "usage": counts,
    }


def failed(error: Exception) -> bytes:
    return event(error_of(error, "id").body())


def test_a_client_that_takes_nothing_is_given_up() -> None:
    closed: list[bool] = []

    async def pieces() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"data: {}\n\n"
        finally:
            closed.append(True)

    async def never(message: Any = None) -> None:
        if message is None or message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def main() -> None:
        stream = EventStream(pieces(), failed, end=DONE, timeout_s=60, stall_s=0.001)
        await stream({"type": "http"}, never, never)

    asyncio.run(asyncio.wait_for(main(), 30))
    assert closed == [True]


def test_a_slow_client_is_not(stall_s: float = 0.001) -> None:
    """It takes a piece now and then, and longer than the limit for all of them."""
    sent: list[bytes] = []

    async def pieces() -> AsyncGenerator[bytes, None]:
        for number in range(3):
            await asyncio.sleep(5 * stall_s)  # the engine's time is not the client's
            yield b"%d" % number

    async def take(message: Any) -> None:
        sent.append(message.get("body", b""))

    async def never() -> Any:
        await asyncio.Event().wait()

    async def main() -> None:
        stream = EventStream(pieces(), failed, end=DONE, timeout_s=60, stall_s=stall_s)
        await stream({"type": "http"}, never, take)

    asyncio.run(asyncio.wait_for(main(), 30))
    assert sent == [b"", b"0", b"1", b"2", b"data: [DONE]\n\n", b""]
