"""Who falls behind gets what is new in fewer and larger pieces, all of it, and holds nobody up."""

import json
import socket
import threading
from typing import Any

import httpx
import pytest

from tests.server.conftest import FRANCE, PARIS, InProcess, Live
from tests.server.raw import connect, metric, until
from tests.server.served import Served
from tests.server.test_disconnect import request

STORY: dict[str, Any] = {
    "prompt": "Once upon a time",
    "ignore_eos": True,
    "temperature": 0,
    "stream": True,
    "return_token_ids": True,
    "logprobs": 20,  # more than a kilobyte a token, so that sockets are soon full
}


def narrow(url: str) -> socket.socket:
    """A connection that holds little of what is not read."""
    connection = socket.socket()
    connection.settimeout(60)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, _, port = url.removeprefix("http://").partition(":")
    connection.connect((host, int(port)))
    return connection


def choices_of(connection: socket.socket) -> list[dict[str, Any]]:
    """The choices of a stream's events, read to its end."""
    found = b""
    while b"[DONE]" not in found[-100:]:
        piece = connection.recv(1 << 20)
        assert piece
        found += piece
    lines = [line[6:] for line in found.split(b"\n") if line.startswith(b"data: {")]
    return [choice for line in lines for choice in json.loads(line)["choices"]]


def check(choices: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    """They are fewer than the tokens, and together the same."""
    sizes = [len(choice["token_ids"]) for choice in choices]
    assert len(sizes) < 0.8 * sum(sizes) and max(sizes) > 0.2 * sum(sizes), sizes
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert [token for choice in choices for token in choice["token_ids"]] == whole["token_ids"]
    names = [token for choice in choices for token in choice["logprobs"]["tokens"]]
    assert names == whole["logprobs"]["tokens"]
    offsets = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
    assert offsets == whole["logprobs"]["text_offset"]


def whole(url: str, max_tokens: int) -> dict[str, Any]:
    body = {**STORY, "stream": False, "max_tokens": max_tokens}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    return answer.json()["choices"][0]


@pytest.mark.slow
def test_a_client_that_stands_still(served: Served) -> None:
    want = whole(served.url, 400)
    with narrow(served.url) as connection:
        connection.sendall(request({**STORY, "max_tokens": 400}))
        assert b"200 OK" in connection.recv(1000, socket.MSG_PEEK)
        until(lambda: metric(served.url, "vllm:num_requests_running") == 0)  # all of it is computed
        body = {"messages": FRANCE, "temperature": 0}
        answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60).json()
        assert answer["choices"][0]["message"]["content"] == PARIS
        check(choices_of(connection), want)


def test_a_loop_that_falls_behind(live: Live, service: InProcess) -> None:
    want, held, go = whole(live.url, 150), threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        go.wait(60)

    with connect(live.url) as connection:
        connection.sendall(request({**STORY, "max_tokens": 150}))
        assert b"200 OK" in connection.recv(1000, socket.MSG_PEEK)
        live.loop.call_soon_threadsafe(hold)
        assert held.wait(60)
        until(lambda: service.num_used_blocks() == 0)  # the engine goes on, to the end
        go.set()
        check(choices_of(connection), want)
