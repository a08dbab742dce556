"""What `quire bench serve` can measure: streamed tokens/s that one client process takes, and how busy that keeps it.

A process beside it writes one event for each stream at each beat of a clock, as an engine does after each step, so that
the client reads every event on its own. `--rate 0` writes as fast as the client reads.
"""

import argparse
import asyncio
import json
import subprocess
import sys
from itertools import repeat

import uvloop

from quire.cli.calls import Api, Question
from quire.cli.client import Client
from quire.cli.drive import Driver

CHOICE = {"index": 0, "logprobs": None, "finish_reason": None, "stop_reason": None}
EVENT = {
    "id": "cmpl-0123456789abcdef",
    "object": "text_completion",
    "created": 1_700_000_000,
    "model": "none",
}


def event(data: bytes) -> bytes:
    data = b"data: " + data + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


async def serve(streams: int, tokens: int, rate: float) -> None:
    """Prints its port, then answers until it is ended."""
    piece = event(json.dumps(EVENT | {"choices": [CHOICE | {"text": " word"}]}).encode())
    usage = {"prompt_tokens": 1, "completion_tokens": tokens}
    last = event(
        json.dumps(EVENT | {"choices": [CHOICE | {"finish_reason": "length"}], "usage": usage}).encode()
    )
    beat = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(h[15:]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length:"))
        await reader.readexactly(length)
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n")
        for data in repeat(piece, tokens):
            writer.write(data)
            await (beat.wait() if rate else writer.drain())
        writer.write(last + event(b"[DONE]") + b"0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def clock() -> None:
        nonlocal beat
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due += streams / rate
            await asyncio.sleep(max(0.0, due - loop.time()))
            beat.set()
            beat = asyncio.Event()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=4096)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await (clock() if rate else server.serve_forever())


async def measure(port: int, streams: int, tokens: int) -> tuple[float, float]:
    """Tokens per second, and the share of the time that this process computed."""
    api = Api(chat=False, path="/v1/completions", model="none", ignore_eos=True, extra={})
    questions = [Question("x", 1, tokens)] * streams
    async with Client(f"http://127.0.0.1:{port}") as client:
        driver = Driver(client=client, api=api, max_concurrency=None, keep_text=False)
        run = await driver.measure(questions, [0.0] * streams, lambda: None)
    failed = [request.error for request in run.requests if request.error]
    if failed:
        raise SystemExit(f"{len(failed)} requests failed: {failed[0]}")
    return sum(request.output_len for request in run.requests) / run.duration, run.busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--rate", type=float, default=20_000, help="tokens/s offered, over all streams")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--serve", type=int, nargs=2, metavar=("STREAMS", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        uvloop.run(serve(*args.serve, args.rate))
        return
    print("streams   offered tok/s   tok/s   client busy")
    for streams in args.streams:
        tokens = max(2, int((args.rate or 100_000) * args.seconds / streams))
        command = [sys.executable, __file__, "--serve", str(streams), str(tokens), "--rate", str(args.rate)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout
            speed, busy = uvloop.run(measure(int(server.stdout.readline()), streams, tokens))
            server.kill()
        print(f"{streams:7} {args.rate or 'all':>15} {speed:7.0f} {100 * busy:9.0f} %")


if __name__ == "__main__":
    main()
