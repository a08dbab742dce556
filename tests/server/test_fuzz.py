"""Whatever is sent, the answer is 200 or a refusal that names its reason; the engine and everybody else go on.

QUIRE_FUZZ_REQUESTS is how many requests are sent while streams run beside them.
"""

import json
import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings

from tests.server.conftest import FRANCE, PARIS, InProcess, Live
from tests.server.raw import connect, metric, read_all, status
from tests.server.served import Served
from tests.server.wild import Wild, bodies, wild

NUM_REQUESTS = int(os.environ.get("QUIRE_FUZZ_REQUESTS", "600"))
NUM_STREAMS = 16
MAX_GROWTH_BYTES = 256 << 20
REFUSALS = {400, 404, 405, 408, 413, 501}
ENDS = (  # of streams: how the last event ends, or begins
    *(b"data: [DONE]", b'"type":"message_stop"}'),
    *(b"event: response.completed\n", b"event: response.incomplete\n"),
)
UNHEALTHY = list(HealthCheck)


def check(answer: bytes, sent: bytes) -> int:
    """The status of a response, which is 200 or a typed refusal."""
    head, _, body = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")
    found, fields = status(head), head.lower()
    if found == 200 or sent.startswith(b"HEAD "):
        said = body.removesuffix(b"0\r\n\r\n").rstrip()  # without the last chunk, an empty one
        last = said.rpartition(b"\n\n")[2]
        assert b"text/event-stream" not in fields or last.endswith(ENDS) or last.startswith(ENDS), (
            sent,
            answer,
        )
        assert found == 200 or found in REFUSALS, (sent, answer)
        return found
    assert found in REFUSALS, (sent, answer)
    assert b"content-type: application/json" in fields, (sent, answer)
    error = json.loads(body)["error"]
    assert error.keys() >= {"message", "type", "param", "code"} and error["message"] and error["type"]
    assert not {word for word in (" at 0x", "Traceback") if word in error["message"]}, (sent, error)
    return found


@given(bodies())
@settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=UNHEALTHY)
def test_any_body(live: Live, asked: tuple[str, bytes]) -> None:
    path, body = asked
    answer = live.post(path, content=body, headers={"content-type": "application/json"})
    if answer.status_code != 200:
        assert answer.status_code in REFUSALS, (body, answer.text)
        error = answer.json()["error"]
        assert error["message"] and error["type"] and " at 0x" not in error["message"], (body, answer.text)


def test_the_engine_is_well_afterwards(live: Live, service: InProcess) -> None:
    answer = live.client().chat.completions.create(model="demo", messages=FRANCE, temperature=0)
    assert answer.choices[0].message.content == PARIS
    assert service.num_used_blocks() == 0


def exchange(url: str, request: Wild) -> bytes:
    """What the server sends back until it closes."""
    with connect(url) as connection:
        try:
            connection.sendall(request.data)
            if not request.whole:
                connection.shutdown(socket.SHUT_WR)
        except OSError:  # it has refused before it has read everything
            pass
        return read_all(connection)


def test_nothing_is_written_into_an_answer(live: Live) -> None:
    """Who sends what is no HTTP while an answer is on its way is cut off, and reads no second status in it."""
    body = b'{"prompt": "hello", "max_tokens": 2000, "ignore_eos": true, "stream": true}'
    head = "POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
    with connect(live.url) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        first = connection.recv(100)
        connection.sendall(b"\x00 this is not HTTP\r\n\r\n")
        answer = first + read_all(connection)
    assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1") == 1 and b"[DONE]" not in answer
    live.until_calls(0)


def test_requests_that_follow_each_other(live: Live) -> None:
    one = b"POST /tokenize HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: "
    ask = b'15\r\n\r\n{"prompt": "a"}'
    with connect(live.url) as connection:
        connection.sendall((one + ask) * 5 + one + b"2\r\n\r\n{}" + b"GET /livez HTTP/1.0\r\n\r\n")
        answer = read_all(connection)
    statuses = [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200"] * 5 + [b"400", b"200"]


class Background:
    """Streams that go on all the time; each must have the text that it had at first."""

    def __init__(self, url: str):
        self.url, self.stop = url, threading.Event()
        self.done: Counter[int] = Counter()
        self.wrong: list[tuple[int, str]] = []
        self.want = [self.ask(number) for number in range(NUM_STREAMS)]
        self.threads = [threading.Thread(target=self.run, args=(n,)) for n in range(NUM_STREAMS)]

    def ask(self, number: int) -> str:
        body: dict[str, Any] = {"prompt": f"Once upon a time {number}", "temperature": 0, "max_tokens": 150}
        with httpx.stream(
            "POST",
            f"{self.url}/v1/completions",
            json={**body, "stream": True, "ignore_eos": True},
            timeout=120,
        ) as answer:
            *events, done = [line[6:] for line in answer.iter_lines() if line]
        assert done == "[DONE]"
        chunks = [json.loads(event) for event in events]
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        return "".join(chunk["choices"][0]["text"] for chunk in chunks)

    def run(self, number: int) -> None:
        while not self.stop.is_set():
            try:
                text = self.ask(number)
            except Exception as error:  # whatever it is, the test reports it
                text = repr(error)
            self.done[number] += 1
            if text != self.want[number]:
                self.wrong.append((number, text))


@contextmanager
def background(url: str) -> Iterator[Background]:
    """The first texts are asked for one at a time: what a stream gets does not depend on the others."""
    streams = Background(url)
    for thread in streams.threads:
        thread.start()
    try:
        yield streams
    finally:
        streams.stop.set()
        for thread in streams.threads:
            thread.join(120)


def resident_bytes(pids: list[int]) -> int:
    """Memory of processes; pages that they share are counted for each."""
    page = os.sysconf("SC_PAGE_SIZE")
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page for pid in pids)


@pytest.mark.slow
def test_anything_while_streams_run(served: Served) -> None:
    seen: Counter[int] = Counter()
    family = served.family()
    restarts = metric(served.url, "quire:engine_restarts_total")
    with background(served.url) as streams:
        before = resident_bytes(family)

        @given(wild)
        @settings(
            derandomize=True,
            database=None,
            deadline=None,
            max_examples=NUM_REQUESTS,
            suppress_health_check=UNHEALTHY,
        )
        def send(request: Wild) -> None:
            answer = exchange(served.url, request)
            if answer or request.whole:
                seen[check(answer, request.data)] += 1
            else:
                seen[0] += 1  # it was no request, and the connection was closed

        send()
        after = resident_bytes(family)
    print(
        f"\nby status: {dict(sorted(seen.items()))}; background: {sum(streams.done.values())} streams ended"
    )
    print(f"memory: {before >> 20} MiB before, {after >> 20} MiB after")
    assert streams.wrong == [] and all(streams.done[number] for number in range(NUM_STREAMS))
    assert served.family() == family  # nothing died, and nothing was left behind
    assert metric(served.url, "quire:engine_restarts_total") == restarts
    assert (
        metric(served.url, "vllm:num_requests_running") == metric(served.url, "vllm:kv_cache_usage_perc") == 0
    )
    assert after - before < MAX_GROWTH_BYTES
    assert seen[200] and seen[400] and seen[501]
    assert httpx.get(f"{served.url}/load").json() == {"server_load": 0}
