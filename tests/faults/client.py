"""Clients of a server under test: many streams at once, and what each of them got. Knows no fault."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

Body = dict[str, Any]
COMPLETIONS = "/v1/completions"
PATIENCE_S = 120.0  # for an answer, whatever happens to the server meanwhile


@dataclass
class Answer:
    """What a client got. `status` 0: not even a status."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None  # of an answer in one piece
    tokens: dict[int, list[int]] = field(default_factory=dict)  # by choice
    texts: dict[int, str] = field(default_factory=dict)
    finish: dict[int, str] = field(default_factory=dict)
    error: Body | None = None
    is_whole: bool = False  # it ended as it should, be it with an error
    broken: str = ""  # how the connection ended, if that was before the answer's end

    @property
    def ok(self) -> bool:
        """It has all that was asked for."""
        return self.status == 200 and self.is_whole and self.error is None and not self.broken

    @property
    def output(self) -> tuple[dict[int, list[int]], dict[int, str], dict[int, str]]:
        """What must be the same with and without faults."""
        return self.tokens, self.texts, self.finish

    def take(self, body: Body) -> int:
        """Take in a chunk, or an answer in one piece; returns how many tokens it brought."""
        self.error = body.get("error", self.error)
        num_tokens = 0
        for choice in body.get("choices", ()):
            index, new = choice["index"], choice.get("token_ids") or []
            self.tokens.setdefault(index, []).extend(new)
            self.texts[index] = self.texts.get(index, "") + choice["text"]
            if choice["finish_reason"] is not None:
                self.finish[index] = choice["finish_reason"]
            num_tokens += len(new)
        return num_tokens


class Connection:
    """One request and its response, byte by byte, so that a test can stop anywhere."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer
        self.status, self.headers = 0, dict[str, str]()

    @classmethod
    async def send(
        cls, url: str, path: str, body: Body | bytes | None = None, **headers: str
    ) -> "Connection":
        """Connect and send a request."""
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 26)
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", f"Host: {parts.netloc}"]
        lines += ["Connection: close", f"Content-Length: {len(content)}", "Content-Type: application/json"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + content)
        return cls(reader, writer)

    async def head(self) -> int:
        """Wait for the status and the headers."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        self.status = int(head[0].split()[1])
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])}
        return self.status

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes."""
        if "content-length" in self.headers:
            yield await self.reader.readexactly(int(self.headers["content-length"]))
            return
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]

    def close(self) -> None:
        self.writer.transport.abort()


async def ask(
    url: str,
    body: Body | bytes,
    heard: Callable[[int], None] = lambda _: None,
    *,
    path: str = COMPLETIONS,
    **headers: str,
) -> Answer:
    """Send a request and take in its answer; `heard` gets the number of tokens in each piece."""
    answer = Answer()
    connection = None
    try:
        async with asyncio.timeout(PATIENCE_S):
            connection = await Connection.send(url, path, body, **headers)
            answer.status = await connection.head()
            answer.headers = connection.headers
            if answer.headers.get("content-type", "").startswith("text/event-stream"):
                await _take_stream(connection, answer, heard)
            else:
                answer.body = json.loads(b"".join([piece async for piece in connection.pieces()]))
                heard(answer.take(answer.body))
                answer.is_whole = True
    except (OSError, EOFError, TimeoutError) as error:
        answer.broken = repr(error)
    finally:
        if connection is not None:
            connection.close()
    return answer


async def _take_stream(connection: Connection, answer: Answer, heard: Callable[[int], None]) -> None:
    rest = b""
    async for piece in connection.pieces():
        *events, rest = (rest + piece).split(b"\n\n")
        num_tokens = 0
        for event in events:
            data = event.removeprefix(b"data: ")
            if data == b"[DONE]":
                answer.is_whole = True
            else:
                num_tokens += answer.take(json.loads(data))
        heard(num_tokens)


async def get(url: str, path: str) -> tuple[int, str]:
    """Status and text; status 0 if there is no server any more."""
    connection = None
    try:
        connection = await Connection.send(url, path)
        status = await connection.head()
        return status, b"".join([piece async for piece in connection.pieces()]).decode()
    except (OSError, EOFError):
        return 0, ""
    finally:
        if connection is not None:
            connection.close()


class Load:
    """Streams that run at once, and how far they are together."""

    def __init__(self, url: str, bodies: Sequence[Body]):
        self.num_tokens, self.wanted = 0, dict[asyncio.Future[None], int]()
        self.tasks = [asyncio.create_task(ask(url, body, self._heard)) for body in bodies]

    @property
    def is_over(self) -> bool:
        return all(task.done() for task in self.tasks)

    async def tokens(self, number: int) -> None:
        """Wait until they have so many tokens together, or have ended."""
        if self.num_tokens >= number:
            return
        reached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.wanted[reached] = number
        await asyncio.wait([reached, self._over()], return_when=asyncio.FIRST_COMPLETED)

    async def answers(self) -> list[Answer]:
        return await asyncio.gather(*self.tasks)

    def _over(self) -> "asyncio.Task[Any]":
        return asyncio.ensure_future(asyncio.wait(self.tasks))

    def _heard(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens
        for reached in [each for each, number in self.wanted.items() if self.num_tokens >= number]:
            del self.wanted[reached]
            if not reached.done():
                reached.set_result(None)


def streams(number: int, max_tokens: int = 96) -> list[Body]:
    """Requests whose outputs are known once they ran: greedy ones, and draws with a seed."""
    every: Body = {"max_tokens": max_tokens, "ignore_eos": True, "stream": True, "return_token_ids": True}
    drawn = {"temperature": 0.9, "top_k": 40, "frequency_penalty": 0.2}
    return [
        {
            **every,
            "prompt": f"Tell me about number {i}, please.",
            **(drawn | {"seed": i} if i % 4 == 3 else {"temperature": 0}),
        }
        for i in range(number)
    ]


def compare(got: Sequence[Answer], want: Sequence[Answer]) -> tuple[int, int]:
    """How many were lost, and how many got something else than without faults."""
    lost = [not answer.ok for answer in got]
    wrong = [answer.ok and answer.output != right.output for answer, right in zip(got, want, strict=True)]
    return sum(lost), sum(wrong)
