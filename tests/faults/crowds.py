"""What is done to servers under test, and what came of it: clients, signals and requests without reason."""

import asyncio
import json
import random
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

from tests.faults.client import COMPLETIONS, Answer, Body, Connection, Load, ask, get, streams
from tests.faults.scenarios import Report, undisturbed
from tests.faults.server import Server, serving, until

CHAT = "/v1/chat/completions"
MILLION = 10**6
ENDLESS: Body = {"max_tokens": 1500, "ignore_eos": True, "stream": True}
WAVE = 250  # clients at a time
SEATS = 8  # sequences that are computed at a time, where there are to be too many


async def disconnects(folder: Path, *, num_clients: int) -> Report:
    """Clients that leave in the middle of a stream, or before it begins."""
    report = Report("8", f"{num_clients} clients disconnect mid-stream")
    bodies = streams(8)
    async with serving(folder) as server:
        want = await undisturbed(server, bodies)
        await _leave(server, min(num_clients, WAVE), 0)  # what is made once has been made
        await server.idle()
        before = await _held(server)
        load = Load(server.url, bodies)
        for first in range(0, num_clients, WAVE):
            await _leave(server, min(WAVE, num_clients - first), first)
        began = time.monotonic()
        report.compare(await load.answers(), want)
        await server.idle()
        seconds = time.monotonic() - began
        async with asyncio.timeout(30):
            while (after := await _held(server)) != before:
                await asyncio.sleep(0.05)
        report.num_requests += num_clients
        report.num_restarts = await server.num_restarts()
        assert report.num_restarts == 0
    report.note = f"cache empty after {seconds:.2f} s; tasks, files, processes {after} as before"
    return report


async def _held(server: Server) -> tuple[int, int, int]:
    """Tasks, open files and processes of an idle server."""
    return await server.num_tasks(), server.open_files(), len(server.family())


async def _leave(server: Server, number: int, first: int) -> None:
    async def leave(i: int) -> None:
        body = {**ENDLESS, "prompt": f"Number {first + i} will not stay.", "n": 1 + i % 2, "temperature": 1}
        connection = await Connection.send(server.url, COMPLETIONS, body)
        if i % 4:
            assert await connection.head() == 200
            await anext(connection.pieces())
        connection.close()

    await asyncio.gather(*(leave(i) for i in range(number)))


async def never_reads(folder: Path, *, num_clients: int, stall_s: float = 1.0) -> Report:
    """Clients that take nothing of streams as large as can be asked for."""
    report = Report("9", f"{num_clients} clients never read, limit {stall_s:g} s")
    bodies = streams(8)
    body = {**ENDLESS, "prompt": "Once upon a time", "n": 16, "temperature": 1, "logprobs": 20}
    async with serving(folder, stall_s=stall_s) as server:
        want = await undisturbed(server, bodies)
        memory, began = server.resident_bytes(), time.monotonic()
        with ExitStack() as stack:
            for _ in range(num_clients):
                _send_only(stack.enter_context(socket.socket()), server.url, body)
            await until(lambda: server.board.get("adds") == len(bodies) + num_clients)
            report.compare(await undisturbed(server, bodies), want)
            await server.idle(90)
            seconds, grown = time.monotonic() - began, server.resident_bytes() - memory
        aborted = await server.metric("vllm:request_success_total", finished_reason="abort")
        assert aborted == num_clients, "they were given up, not finished"
        assert grown < num_clients * (32 << 20)
    report.note = (
        f"all given up after {seconds:.1f} s; {grown / num_clients / 2**20:.1f} MiB for each meanwhile"
    )
    return report


def _send_only(client: socket.socket, url: str, body: Body) -> None:
    parts, content = urlsplit(url), json.dumps(body).encode()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((parts.hostname, parts.port))
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)


async def overloaded(
    folder: Path, *, factor: float, seconds: float, wait_s: float = 2.0, deadline_s: float | None = None
) -> Report:
    """Many times the load that the server can bear, by chance, with a bound on waiting.

    `deadline_s`: the longest time to the first token for 99 of 100 that get in; None where no time is promised.
    """
    report = Report("10", f"{factor:g} times the capacity for {seconds:g} s, wait {wait_s:g} s at most")
    chance = random.Random(10)
    async with serving(folder, "--max-num-seqs", str(SEATS), "--max-queue-seconds", f"{wait_s:g}") as server:
        able = await _capacity(server, seconds / 4)
        memory, firsts, tasks = server.resident_bytes(), list[float](), list[asyncio.Task[Answer]]()
        due = time.monotonic()
        for i in range(int(factor * able * seconds)):
            due += chance.expovariate(factor * able)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            tasks.append(asyncio.create_task(_timed(server, i, firsts)))
        answers = await asyncio.gather(*tasks)
        grown = server.resident_bytes() - memory
        await server.idle()
        report.num_restarts = await server.num_restarts()
    refused = [answer for answer in answers if answer.status == 503]
    late = sorted(firsts)[int(len(firsts) * 0.99)]
    report.num_requests = len(answers)
    report.num_lost = len(answers) - len(refused) - sum(answer.ok for answer in answers)
    assert refused and firsts and report.num_restarts == 0
    assert all(int(answer.headers["retry-after"]) > 0 for answer in refused)
    assert grown < 64 << 20
    assert deadline_s is None or late < deadline_s, f"the first token of 1 in 100 took {late:.2f} s"
    report.note = (
        f"{able:.0f} requests/s can be served; {len(firsts)} answered, {len(refused)} refused with Retry-After; "
        f"p99 to the first token {late:.2f} s; memory {grown / 2**20:+.0f} MiB"
    )
    return report


async def _capacity(server: Server, seconds: float) -> float:
    """Requests per second, with as many at a time as the engine computes, so that none has to wait."""
    begin, firsts, done = time.monotonic(), list[float](), 0

    async def customer(number: int) -> None:
        nonlocal done
        while time.monotonic() - begin < seconds:
            assert (await _timed(server, number, firsts)).ok
            done += 1

    await asyncio.gather(*(customer(number) for number in range(SEATS)))
    return done / (time.monotonic() - begin)


async def _timed(server: Server, number: int, firsts: list[float]) -> Answer:
    """An answer; if it has tokens, the seconds to the first are noted."""
    asked, first = time.monotonic(), list[float]()
    body = {
        "prompt": f"Tell me about number {number}.",
        "max_tokens": 48,
        "ignore_eos": True,
        "temperature": 0,
    }
    answer = await ask(
        server.url,
        {**body, "stream": True, "return_token_ids": True},
        lambda num_tokens: first.append(time.monotonic() - asked) if num_tokens and not first else None,
    )
    firsts += first
    return answer


async def drained(folder: Path, *, num_streams: int) -> Report:
    """A signal to stop under load."""
    report = Report("11", f"SIGTERM under {num_streams} requests")
    bodies = [{**body, "stream": i % 2 == 0} for i, body in enumerate(streams(num_streams))]
    async with serving(folder, step_s=0.01) as server:
        want = await undisturbed(server, bodies)
        load = Load(server.url, bodies)
        await load.tokens(num_streams * 5)
        began = time.monotonic()
        server.send(signal.SIGTERM)
        await server.readyz(503)
        seconds = time.monotonic() - began
        late = await ask(server.url, bodies[0])
        assert late.status == 503 and int(late.headers["retry-after"]) > 0
        assert (await get(server.url, "/livez"))[0] == 200
        report.compare(await load.answers(), want)
        code = await server.exit_code()
        assert code == 0 and time.monotonic() - began < 30, "before the time to drain is over"
        await server.gone()
    report.note = f"/readyz 503 after {seconds:.3f} s; later requests 503; exit code {code}"
    return report


async def second_signal(folder: Path, *, num_streams: int) -> Report:
    """A signal to stop under load, and then another."""
    report = Report("11", f"a second SIGTERM under {num_streams} requests", num_requests=num_streams)
    async with serving(folder, step_s=0.05) as server:
        load = Load(server.url, streams(num_streams, 1000))
        await load.tokens(num_streams * 2)
        server.send(signal.SIGTERM)
        await server.readyz(503)
        began = time.monotonic()
        server.send(signal.SIGTERM)
        code = await server.exit_code()
        seconds = time.monotonic() - began
        answers = await load.answers()
        assert code == 130 and not any(answer.ok for answer in answers)
        await server.gone()
    report.note = f"exit code {code} after {seconds:.2f} s"
    return report


async def frontend_killed(folder: Path, *, num_streams: int) -> Report:
    """SIGKILL of the process that starts all others."""
    report = Report("12", f"frontend killed under {num_streams} streams", num_requests=num_streams)
    async with serving(folder) as server:
        assert len(server.family()) == 3
        load = Load(server.url, streams(num_streams, 1000))
        await load.tokens(num_streams * 2)
        server.send(signal.SIGKILL)
        assert await server.exit_code() == -signal.SIGKILL
        seconds = await server.gone()
        assert not any(answer.ok for answer in await load.answers())
    report.note = f"no process, port, file or shared memory left after {seconds:.3f} s"
    return report


def unreasonable() -> dict[str, tuple[str, Body]]:
    """Requests that must be refused before the engine hears of them, with their paths."""
    hello, words = "hello", "word " * MILLION
    bodies: dict[str, Body] = {
        "a million tokens": {"prompt": [5] * MILLION},
        "a million words": {"prompt": words},
        "an empty prompt": {"prompt": ""},
        "no prompt": {"prompt": []},
        "an empty prompt among others": {"prompt": [hello, ""]},
        "a million prompts": {"prompt": [hello] * MILLION},
        "a million stop strings": {"prompt": hello, "stop": [f"s{i}" for i in range(MILLION)]},
        "a long stop string": {"prompt": hello, "stop": words},
        "a million biases": {"prompt": hello, "logit_bias": {str(i): 1 for i in range(MILLION)}},
        "a million bad words": {"prompt": hello, "bad_words": ["bad"] * MILLION},
        "a million outputs": {"prompt": hello, "n": MILLION},
        "no such token": {"prompt": [MILLION]},
        "a negative token": {"prompt": [-1]},
    }
    found = {name: (COMPLETIONS, body) for name, body in bodies.items()}
    message = {"role": "user", "content": hello}
    found["no messages"] = (CHAT, {"messages": []})
    found["a million messages"] = (CHAT, {"messages": [message] * MILLION})
    found["a message of a million words"] = (CHAT, {"messages": [{**message, "content": words}]})
    return found


async def refused(folder: Path) -> Report:
    """Requests without reason, one after the other."""
    report = Report("18", "a million of everything, and nothing of it")
    async with serving(folder) as server:
        want = await undisturbed(server, streams(4))
        await server.idle()
        before = [server.board.get(name) for name in ("adds", "steps")]
        slowest_s = 0.0
        for name, (path, body) in unreasonable().items():
            content = json.dumps(body).encode()
            began = time.monotonic()
            answer = await ask(server.url, content, path=path)
            slowest_s = max(slowest_s, time.monotonic() - began)
            assert 400 <= answer.status < 500, (name, answer.status, answer.broken)
            assert answer.error and answer.error["message"], name
            report.num_requests += 1
        assert [server.board.get(name) for name in ("adds", "steps")] == before, "the engine was not asked"
        report.compare(await undisturbed(server, streams(4)), want)
        report.num_restarts = await server.num_restarts()
        assert report.num_restarts == 0
    report.note = f"4xx each, the slowest after {slowest_s:.1f} s; no word of it to the engine"
    return report


async def wrong_clock(folders: Sequence[Path], *, num_streams: int) -> Report:
    """A wall clock that jumps by years."""
    report = Report("18", "wall clock jumps by up to ten years, either way")
    bodies = streams(num_streams)
    async with serving(folders[0]) as server:
        want = await undisturbed(server, bodies)
    async with serving(folders[1], wrong_clock=True, hang_s=0.4, step_s=0.02) as server:
        report.compare(await Load(server.url, bodies).answers(), want)
        report.num_restarts = await server.num_restarts()
        assert report.num_restarts == 0
        server.send(signal.SIGTERM)
        assert await server.exit_code() == 0
    report.note = "nothing depends on it"
    return report
