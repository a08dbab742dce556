"""A small server of OpenAI's API for the client benchmark to talk to: it says what its `Manners` tell it to."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from quire.text.tokenizer import Tokenizer

MODEL = "peer"
Answer = tuple[int, Any]


@dataclass
class Manners:
    """How to answer. Numbers count the requests for text, from 0.

    Attributes:
        refuse: number -> status and body, instead of an answer.
        break_off: numbers whose connection is closed after the first piece.
        fail: numbers that get an error event after the first piece.
        together: answer only when this many requests are there.
        usage: whether to count tokens.
        keep_alive: whether to keep connections open.
        tokenizer: for /tokenize and /detokenize; None: they do not exist.
    """

    refuse: dict[int, Answer] = field(default_factory=dict)
    break_off: set[int] = field(default_factory=set)
    fail: set[int] = field(default_factory=set)
    together: int = 1
    usage: bool = True
    keep_alive: bool = True
    tokenizer: Tokenizer | None = None


class Peer:
    """What it was asked is in `bodies`, `heads` and `num_connections`."""

    def __init__(self, manners: Manners):
        self.manners = manners
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.num_connections = 0
        self.port = 0
        self._waiting = 0
        self._all_here = asyncio.Event()

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while await self._one(reader, writer):
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next((int(h[15:]) for h in head.lower().split("\r\n") if h.startswith("content-length:")), 0)
        body = await reader.readexactly(length)
        path = head.split()[1]
        if path in ("/v1/completions", "/v1/chat/completions"):
            number = len(self.bodies)
            self.heads.append(head)
            self.bodies.append(json.loads(body))
            await self._wait_for_others()
            if number not in self.manners.refuse:
                return self._stream(writer, number, chat=path.endswith("chat/completions"))
            status, answer = self.manners.refuse[number]
        else:
            status, answer = self._plain(path, body)
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(data)) + data)
        return True

    def _plain(self, path: str, body: bytes) -> Answer:
        tokenizer = self.manners.tokenizer
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]}
        if path == "/tokenize" and tokenizer:
            asked = json.loads(body)
            ids = tokenizer.encode(asked["prompt"], add_special_tokens=asked["add_special_tokens"])
            return 200, {"count": len(ids), "tokens": ids}
        if path == "/detokenize" and tokenizer:
            return 200, {"prompt": tokenizer.decode(json.loads(body)["tokens"], skip_special_tokens=False)}
        return 404, {"error": {"message": f"no {path} here", "type": "NotFoundError", "code": 404}}

    async def _wait_for_others(self) -> None:
        self._waiting += 1
        if self._waiting == self.manners.together:
            self._waiting = 0
            self._all_here.set()
            self._all_here = asyncio.Event()
            return
        async with asyncio.timeout(30):  # a client that sends too few at once fails here, and does not hang
            await self._all_here.wait()

    def _stream(self, writer: asyncio.StreamWriter, number: int, *, chat: bool) -> bool:
        body, manners = self.bodies[number], self.manners
        close = b"" if manners.keep_alive else b"connection: close\r\n"
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n" + close + b"\r\n"
        )
        num_tokens = body["max_completion_tokens" if chat else "max_tokens"]
        if chat:
            send(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for i in range(num_tokens):
            choice = {"delta": {"content": f" {i}"}} if chat else {"text": f" {i}"}
            send(writer, {"object": "chunk", "choices": [{"index": 0, **choice, "finish_reason": None}]})
            if number in manners.break_off:
                return False
            if number in manners.fail:
                send(writer, {"error": {"message": "logits are NaN", "code": 500}})
                break
        else:
            choice = {"delta": {}} if chat else {"text": ""}
            send(writer, {"choices": [{"index": 0, **choice, "finish_reason": "length"}]})
            if manners.usage:
                usage = {"prompt_tokens": 7, "completion_tokens": num_tokens, "total_tokens": 7 + num_tokens}
                send(writer, {"choices": [], "usage": usage})
        send(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")
        return manners.keep_alive


def send(writer: asyncio.StreamWriter, event: object) -> None:
    data = b"data: " + (event if isinstance(event, str) else json.dumps(event)).encode() + b"\n\n"
    writer.write(b"%x\r\n" % len(data) + data + b"\r\n")


@contextmanager
def serving(manners: Manners) -> Iterator[Peer]:
    """A peer in a thread of its own, on a free port of this machine."""
    peer, ready = Peer(manners), threading.Event()
    stop: list[Callable[[], None]] = []

    async def serve() -> None:
        loop, end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(peer.talk, "127.0.0.1", 0)
        peer.port = server.sockets[0].getsockname()[1]
        stop.append(lambda: loop.call_soon_threadsafe(end.set))
        ready.set()
        async with server:
            await end.wait()
            server.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    ready.wait()
    try:
        yield peer
    finally:
        stop[0]()
        thread.join()
