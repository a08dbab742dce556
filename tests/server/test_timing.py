"""What a call tells of where its time went: in the answer if it asks, in a header always."""

import json
from typing import Any

import httpx
import pytest

from quire.server.timing import Timing
from quire.types import Request, RequestMetrics, RequestOutput, SamplingParams
from tests.server.conftest import FRANCE, Live

CHAT = ("/v1/chat/completions", {"messages": FRANCE, "temperature": 0})
TEXT = ("/v1/completions", {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 6})
CALLS = pytest.mark.parametrize("path, body", [CHAT, TEXT], ids=["chat", "text"])
KEYS = ["queue_s", "prefill_s", "decode_s", "total_s", "tokens_per_second", "cached_tokens"]
KEYS += ["num_preemptions", "num_replays"]


def durations(answer: httpx.Response) -> dict[str, float]:
    parts = [part.split(";dur=") for part in answer.headers["server-timing"].split(", ")]
    return {name: float(value) for name, value in parts}


def chunks(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def adds_up(timing: dict[str, Any]) -> bool:
    parts = timing["queue_s"] + timing["prefill_s"] + timing["decode_s"]
    return 0 < parts <= timing["total_s"] < 60


@CALLS
def test_an_answer_has_its_timing_if_asked(live: Live, path: str, body: dict[str, Any]) -> None:
    answer = live.post(path, json={**body, "return_timing": True})
    timing, usage = answer.json()["timing"], answer.json()["usage"]
    assert list(timing) == KEYS and adds_up(timing)
    assert timing["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"]
    computing_s = timing["prefill_s"] + timing["decode_s"]
    assert timing["tokens_per_second"] == pytest.approx(usage["completion_tokens"] / computing_s, rel=0.01)
    assert timing["num_replays"] == 0 and "warnings" not in answer.json()
    plain = live.post(path, json=body)
    assert "timing" not in plain.json()
    for each in (answer, plain):
        assert list(durations(each)) == ["queue", "prefill", "decode", "total"]


@CALLS
@pytest.mark.parametrize("usage", [False, True])
def test_a_streams_last_chunk_has_it(live: Live, path: str, body: dict[str, Any], usage: bool) -> None:
    asked = {**body, "stream": True, "return_timing": True, "stream_options": {"include_usage": usage}}
    answer = live.post(path, json=asked)
    *earlier, last = chunks(answer)
    assert last["choices"] == [] and list(last["timing"]) == KEYS and adds_up(last["timing"])
    assert ("usage" in last) == usage and not any("timing" in chunk for chunk in earlier)
    assert earlier[-1]["choices"][0]["finish_reason"] is not None
    known = durations(answer)
    assert {"queue", "prefill", "total"} <= known.keys() and known["total"] <= last["timing"][
        "total_s"
    ] * 1000


@CALLS
def test_a_stream_that_does_not_ask_ends_as_ever(live: Live, path: str, body: dict[str, Any]) -> None:
    answer = live.post(path, json={**body, "stream": True})
    assert chunks(answer)[-1]["choices"][0]["finish_reason"] is not None
    assert "total" in durations(answer)


def test_refusals_have_none(live: Live) -> None:
    for body in ({"messages": FRANCE, "n": 99}, {"messages": FRANCE, "n": 99, "stream": True}):
        assert "server-timing" not in live.post(CHAT[0], json=body).headers


def test_several_prompts_count_together() -> None:
    """From the first arrival to the last token; what nobody knows yet is left out."""

    def output(*times: float | None, cached: int = 0, finished: bool = True) -> RequestOutput:
        names = ("arrival_s", "scheduled_s", "first_token_s", "last_token_s")
        metrics = RequestMetrics(
            **dict(zip(names, times, strict=True)), num_generated_tokens=4, num_replays=1
        )
        return RequestOutput("x", None, [1], [], finished, num_cached_tokens=cached, metrics=metrics)

    requests = [
        Request(id="x", prompt_token_ids=(1,), params=SamplingParams(), arrival_s=s) for s in (1.0, 1.5)
    ]
    timing = Timing(requests)
    assert list(timing.body()) == ["total_s", *KEYS[4:]] and timing.body()["tokens_per_second"] is None
    timing.latest = {0: output(1.0, 2.0, 4.0, 4.5, finished=False), 1: output(1.5, 3.0, 3.5, 8.5, cached=3)}
    assert "decode" not in timing.header()["Server-Timing"]
    timing.latest[0].finished = True
    found = timing.body()
    assert (found["queue_s"], found["prefill_s"], found["decode_s"]) == (1.0, 1.5, 5.0)
    assert found["tokens_per_second"] == pytest.approx(8 / 6.5, abs=0.001)
    assert found["cached_tokens"] == 3 and found["num_replays"] == 2
    assert timing.header()["Server-Timing"].startswith(
        "queue;dur=1000.0, prefill;dur=1500.0, decode;dur=5000.0"
    )
