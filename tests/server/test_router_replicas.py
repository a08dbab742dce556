"""A router in front of three replicas in processes of their own: what is cached is found, and one may be killed."""

import asyncio
import itertools
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import httpx
import pytest

from tests.server.raw import metric
from tests.server.routed import routing
from tests.server.served import Served, serve

NUM_STREAMS, NUM_WHOLE = 12, 6

pytestmark = pytest.mark.slow  # nine processes


@pytest.fixture
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Served]]:
    logs = tmp_path_factory.mktemp("replicas")
    with ExitStack() as stack:
        yield [stack.enter_context(serve(logs / f"{i}", "--num-threads", "1")) for i in range(3)]


def conversations(town: str, num: int, num_turns: int) -> Iterator[dict[str, object]]:
    """Turns of several conversations, in turn; each has a story of its own before it."""
    said = [
        f"{town}, story {i}. " + " ".join(f"In year {i * 37 + k} it rained." for k in range(40))
        for i in range(num)
    ]
    for turn in range(num_turns):
        for i in range(num):
            said[i] += f" What came after turn {turn}, and why did it, and who saw it?"
            yield {"prompt": said[i], "max_tokens": 2, "temperature": 0}


def cached_tokens(town: str, url_of: Iterator[str]) -> int:
    found = 0
    for body in conversations(town, 7, 4):
        answer = httpx.post(next(url_of) + "/v1/completions", json=body, timeout=60).json()
        found += answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def test_more_is_cached_where_the_router_sends_prompts_than_where_turns_do(replicas: list[Served]) -> None:
    urls = [served.url for served in replicas]
    in_turn = cached_tokens("Oslo", itertools.cycle(urls))
    with routing(*urls, disable_access_log=True) as routed:
        by_cost = cached_tokens("Rome", itertools.repeat(routed.url))
    assert by_cost > 1.2 * in_turn > 0


@dataclass
class Load:
    """Requests through a router, streamed and not."""

    url: str
    pieces: Counter[int] = field(default_factory=Counter)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def one(self, client: httpx.AsyncClient, number: int, *, stream: bool) -> tuple[int, str]:
        body = {
            "prompt": f"Tell me about number {number}, please.",
            "max_tokens": 200,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
        }
        async with client.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
            text = ""
            async for line in answer.aiter_lines():
                if stream and line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                    self.pieces[number] += 1
                    self.changed.set()
                elif not stream:
                    text = json.loads(line)["choices"][0]["text"]
            return answer.status_code, text

    async def until_all_stream(self) -> None:
        while len(self.pieces) < NUM_STREAMS:
            self.changed.clear()
            await self.changed.wait()


async def run(url: str, victims: list[Served]) -> list[tuple[int, str]]:
    """All requests at once; when every stream has begun, the victims are killed."""
    load = Load(url)
    async with httpx.AsyncClient(timeout=120) as client:
        tasks = [
            asyncio.create_task(load.one(client, number, stream=number < NUM_STREAMS))
            for number in range(NUM_STREAMS + NUM_WHOLE)
        ]
        await asyncio.wait_for(load.until_all_stream(), 60)
        for victim in victims:
            for pid in victim.family():
                os.kill(pid, signal.SIGKILL)
        return list(await asyncio.gather(*tasks))


def test_one_of_three_is_killed_and_nothing_is_lost(replicas: list[Served]) -> None:
    urls = [served.url for served in replicas]
    with routing(*urls, disable_access_log=True) as routed:
        expected = asyncio.run(run(routed.url, []))
        assert metric(routed.url, "quire:router_replays_total") == 0
        found = asyncio.run(run(routed.url, replicas[:1]))
        assert found == expected and {code for code, _ in found} == {200}
        assert metric(routed.url, "quire:router_replays_total") > 0, "nothing was there"
        assert metric(routed.url, "quire:router_lost_total") == 0
        routed.poll()
        assert [r.state.value for r in routed.site.forwarder.router.replicas] == ["down", "up", "up"]
        assert asyncio.run(run(routed.url, [])) == expected
