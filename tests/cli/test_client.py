"""The HTTP client against answers written out by hand, whole, cut and wrong."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import cast

import pytest

from quire.cli.client import Client, ConnectionFailed
from quire.errors import RequestFailed

SIZED = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"
TO_THE_END = b"HTTP/1.1 200 OK\r\n\r\nhello"
STAY = b""  # in a script: wait for the next request


def talk(scripts: Sequence[Sequence[bytes]], use: Callable[[Client], Awaitable[None]]) -> int:
    """`use` a client of a server whose connections answer what their scripts say, and then close; returns how
    many connections there were.
    """
    handlers: list[asyncio.Task[None]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        script = scripts[min(len(handlers), len(scripts) - 1)]
        handlers.append(cast(asyncio.Task[None], asyncio.current_task()))
        with suppress(asyncio.IncompleteReadError, ConnectionError):  # the client has seen enough
            for piece in (STAY, *script):
                if piece == STAY:
                    await reader.readuntil(b"\r\n\r\n")
                writer.write(piece)
                await writer.drain()
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server, asyncio.timeout(30):
            async with Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
                await use(client)
            server.close()
            await asyncio.gather(*handlers)

    asyncio.run(main())
    return len(handlers)


async def get(client: Client) -> tuple[int, bytes]:
    pieces: list[bytes] = []
    status, _ = await client.send("/", None, lambda piece, now: pieces.append(piece))
    return status, b"".join(pieces)


def test_when_to_try_again_is_told_and_not_kept() -> None:
    async def use(client: Client) -> None:
        replies = [await client.send("/", None, lambda piece, now: None) for _ in range(2)]
        assert replies == [(503, "7"), (200, "")]

    refused = b"HTTP/1.1 503 X\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n"
    assert talk([[refused, STAY, SIZED]], use) == 1


@pytest.mark.parametrize("whole", [SIZED, CHUNKED, TO_THE_END])
def test_answers_at_every_split(whole: bytes) -> None:
    async def use(client: Client) -> None:
        for _ in scripts:
            assert await get(client) == (200, b"hello")

    scripts = [[whole[:cut], whole[cut:]] for cut in range(1, len(whole))]
    assert talk(scripts, use) == len(scripts)


@pytest.mark.parametrize("whole", [SIZED, CHUNKED])
def test_answers_that_are_cut_are_failures(whole: bytes) -> None:
    async def use(client: Client) -> None:
        for _ in scripts:
            with pytest.raises(ConnectionFailed, match="closed before the answer was complete"):
                await get(client)

    scripts = [[whole[:cut]] for cut in range(1, len(whole))]
    talk(scripts, use)


def test_what_is_not_http_is_a_failure() -> None:
    async def use(client: Client) -> None:
        with pytest.raises(ConnectionFailed, match="not HTTP/1.1"):
            await get(client)

    talk([[b"SSH-2.0-OpenSSH_9.9\r\n", STAY]], use)


def test_a_connection_is_used_again() -> None:
    async def use(client: Client) -> None:
        for _ in range(3):
            assert await get(client) == (200, b"hello")

    assert talk([[SIZED, STAY, SIZED, STAY, CHUNKED, STAY]], use) == 1


def test_a_connection_closed_while_idle_is_made_again() -> None:
    """Whether the client has seen it closed before it asks again, or only then."""

    async def use(client: Client) -> None:
        for _ in range(5):
            assert await get(client) == (200, b"hello")

    assert talk([[SIZED]], use) == 5


def test_an_answer_that_began_is_not_asked_for_again() -> None:
    async def use(client: Client) -> None:
        assert await get(client) == (200, b"hello")
        with pytest.raises(ConnectionFailed):
            await get(client)

    assert talk([[SIZED, STAY, SIZED[:-1]]], use) == 1


def test_requests_under_way_end_with_the_client() -> None:
    async def use(client: Client) -> None:
        waiting.append(asyncio.create_task(get(client)))
        while not client._open:
            await asyncio.sleep(0)

    waiting: list[asyncio.Task[tuple[int, bytes]]] = []
    talk([[STAY]], use)
    assert waiting[0].cancelled() or isinstance(waiting[0].exception(), ConnectionFailed)


def test_json() -> None:
    async def use(client: Client) -> None:
        assert await client.json("/x", {}) == [1]
        with pytest.raises(RequestFailed, match="/x answers with something other than JSON"):
            await client.json("/x")
        with pytest.raises(RequestFailed, match=r"/x: 404 Not Found: hello$"):
            await client.json("/x")

    talk([[TO_THE_END.replace(b"hello", b"[1]")], [TO_THE_END], [SIZED.replace(b"200", b"404")]], use)
