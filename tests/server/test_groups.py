"""`quire serve --data-parallel-size 2`: one of its engine groups is killed while all streams run."""

import asyncio
import json
import os
import signal
from collections import Counter
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.served import Served, serve

NUM = 8

pytestmark = pytest.mark.slow  # four processes or more


async def stream(client: httpx.AsyncClient, number: int, pieces: Counter[int], news: asyncio.Event) -> str:
    body = {
        "prompt": f"Tell me about number {number}, please.",
        "max_tokens": 150,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    text = ""
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
                pieces[number] += 1
                news.set()
    return text


async def run(served: Served, victim: int | None) -> list[str]:
    """All streams at once; when all have begun, the victim is killed, and the server is ready all the time."""
    pieces, news = Counter[int](), asyncio.Event()
    async with httpx.AsyncClient(base_url=served.url, timeout=120) as client:
        tasks = [asyncio.create_task(stream(client, number, pieces, news)) for number in range(NUM)]
        while len(pieces) < NUM:
            news.clear()
            await asyncio.wait_for(news.wait(), 60)
        if victim is not None:
            os.kill(victim, signal.SIGKILL)
            assert (await client.get("/readyz")).status_code == 200
        return list(await asyncio.gather(*tasks))


@pytest.mark.parametrize("num_frontends", [1, 2])
def test_a_group_is_killed_and_nothing_is_lost(tmp_path: Path, num_frontends: int) -> None:
    options = ("--data-parallel-size", "2", "--num-threads", "1", "--api-server-count", str(num_frontends))
    with serve(tmp_path / "log", *options, "--admin-socket", str(tmp_path / "admin")) as served:
        with httpx.Client(
            transport=httpx.HTTPTransport(uds=str(tmp_path / "admin")), base_url="http://x"
        ) as admin:
            expected = asyncio.run(run(served, None))
            before = admin.get("/server_info").json()
            assert len(before["engine_pids"]) == 2 and before["num_replays"] == 0
            assert asyncio.run(run(served, before["engine_pids"][0])) == expected
            after = admin.get("/server_info").json()
            assert after["engine_pids"][0] != before["engine_pids"][0]
            assert after["engine_pids"][1] == before["engine_pids"][1]
            assert (
                after["num_restarts"] == 1 and 0 < after["num_replays"] < NUM and after["num_requests"] == 0
            )
        steps = {
            sample.labels["engine"]: sample.value
            for family in text_string_to_metric_families(httpx.get(served.url + "/metrics").text)
            for sample in family.samples
            if sample.name == "vllm:iteration_tokens_total_count"
        }
        assert steps.keys() == {"0", "1"} and min(steps.values()) > 100
        assert (
            httpx.get(served.url + "/load").headers["x-engine-load"].startswith("queued_tokens=0, running=0")
        )
        assert served.stop() == 0
