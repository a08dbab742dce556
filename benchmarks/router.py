"""Three replicas of the demo model, conversations over them: `quire router` beside taking turns.

`python benchmarks/router.py` starts `quire serve demo` three times, with one thread each, once for each way to choose.
"""

import argparse
import asyncio
import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import httpx

COMMAND = [sys.executable, "-m", "quire.cli.main"]
SERVE = ["serve", "demo", "--port", "0", "--device", "cpu", "--num-threads", "1", "--disable-access-log"]
CACHE = ["--kv-cache-memory-bytes", "64M"]
NUM_REPLICAS = 3


@contextmanager
def started(words: list[str]) -> Iterator[str]:
    """A server's URL."""
    process = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, text=True)
    try:
        if process.stdout is None:
            raise RuntimeError("no output")
        for line in process.stdout:
            if line.startswith("Listening at "):
                yield line.split()[2].removesuffix(";").removesuffix("/v1")
                return
        raise RuntimeError(f"{words} did not start")
    finally:
        process.terminate()
        process.wait(60)


@dataclass
class Found:
    """What was measured."""

    first_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def __str__(self) -> str:
        ordered = sorted(self.first_s)
        times = [1000 * ordered[int(len(ordered) * share)] for share in (0.5, 0.95, 0.99)]
        share = self.cached_tokens / self.prompt_tokens
        shown = " ".join(f"{ms:.0f}" for ms in times)
        return f"{len(ordered)} requests, hits {share:.1%}, first token p50 p95 p99 {shown} ms"


async def turn(client: httpx.AsyncClient, url: str, prompt: str, found: Found) -> str:
    """One request; its answer's text."""
    body = {
        "prompt": prompt,
        "max_tokens": 24,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begin, text = time.perf_counter(), ""
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            if not text:
                found.first_s.append(time.perf_counter() - begin)
            event = json.loads(line[6:])
            text += "".join(choice["text"] for choice in event["choices"]) or " "
            if usage := event.get("usage"):
                found.prompt_tokens += usage["prompt_tokens"]
                found.cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]
    return text


async def conversation(
    client: httpx.AsyncClient, number: int, at_s: float, url_of: Callable[[], str], found: Found
) -> None:
    chance = random.Random(number)
    await asyncio.sleep(at_s)
    length = chance.choice([40, 80, 120])
    said = f"Story {number}. " + " ".join(f"In year {number * 37 + k} it rained." for k in range(length))
    for _ in range(chance.choice([2, 4, 6])):
        said += f" What came after {chance.randrange(10**6)}, and who saw it?"
        said += await turn(client, url_of(), said, found)
        await asyncio.sleep(chance.expovariate(0.5))


async def measure(url_of: Callable[[], str], sessions_per_s: float, length_s: float) -> Found:
    chance, found, now = random.Random(1), Found(), 0.0
    async with httpx.AsyncClient(timeout=120) as client, asyncio.TaskGroup() as group:
        for number in itertools.count():
            now += chance.expovariate(sessions_per_s)
            if now > length_s:
                break
            group.create_task(conversation(client, number, now, url_of, found))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions-per-second", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    for way in ("turns", "router"):
        with ExitStack() as stack:
            urls = [stack.enter_context(started([*SERVE, *CACHE])) for _ in range(NUM_REPLICAS)]
            if way == "router":
                words = ["router", "--port", "0", "--disable-access-log", "--backend", *urls]
                urls = [stack.enter_context(started(words))]
            turns = itertools.cycle(urls)
            found = asyncio.run(measure(lambda: next(turns), args.sessions_per_second, args.seconds))  # noqa: B023
        sys.stdout.write(f"{way}: {found}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
