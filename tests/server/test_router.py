"""A router in front of one server or more: what comes through, and what becomes of requests when a server fails."""

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from quire.engine.engine import Engine
from quire.engine.service import Status
from quire.server.resume import ASKED, COMMENT, Told, told
from quire.types import CacheMisses, CompletionOutput, Request, RequestOutput
from tests.cli.peer import Manners, Peer
from tests.cli.peer import serving as peer
from tests.processes import started
from tests.server.conftest import FRANCE, PARIS, InProcess, Live, serving
from tests.server.raw import head, metric, status
from tests.server.routed import Routed, routing

STORY = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
STREAM = {**STORY, "stream": True}
ID = {"x-request-id": "the-same"}
RETRY_AT_ONCE = {"error": {"message": "busy", "type": "x", "param": None, "code": 503}}


@pytest.fixture(scope="module")
def routed(live: Live) -> Iterator[Routed]:
    with routing(live.url) as routed:
        yield routed


def url_of(found: Peer) -> str:
    return f"http://127.0.0.1:{found.port}"


def plain(text: str) -> str:
    """Without what differs between two calls."""
    return re.sub(r'"created":\d+', "", text)


BODIES = {
    "whole": STORY,
    "stream": STREAM,
    "log probabilities": {**STREAM, "logprobs": 2},
    "usage": {**STREAM, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "token ids": {**STREAM, "return_token_ids": True},
    "echo": {**STREAM, "echo": True},
    "wrong": {**STREAM, "temperature": -3},
    "no such model": {**STREAM, "model": "none"},
}


@pytest.mark.parametrize("name", BODIES)
def test_answers_are_the_servers_byte_for_byte(routed: Routed, live: Live, name: str) -> None:
    body = BODIES[name]
    one = (
        {**body, "max_tokens": 1} if body.get("stream") else body
    )  # busy servers send several tokens at a time
    found, own = (at.post("/v1/completions", json=one, headers=ID) for at in (routed, live))
    assert (found.status_code, plain(found.text)) == (own.status_code, plain(own.text))
    all_of_it = (by_choice(at.post("/v1/completions", json=body).text) for at in (routed, live))
    assert next(all_of_it) == next(all_of_it)
    assert found.headers["x-request-id"] == "the-same"
    assert found.headers["content-type"] == own.headers["content-type"]
    assert ASKED not in found.headers


def test_other_routes_come_through_and_those_that_are_nobodys_business_do_not(
    routed: Routed, live: Live
) -> None:
    assert routed.get("/v1/models").json() == live.get("/v1/models").json()
    assert (
        routed.post("/tokenize", json={"prompt": "a b"}).json()
        == live.post("/tokenize", json={"prompt": "a b"}).json()
    )
    for path in ("/requests", "/v1/../metrics", "/v1/%2e%2e/metrics", "//v1/models", "/v1//models", "/docs"):
        assert status(head(routed.url, f"GET {path}")) == 404, path
    assert head(routed.url, "DELETE /v1/models").startswith(b"HTTP/1.1 405"), "the server's answer"


def test_clients_work(routed: Routed) -> None:
    client = routed.client()
    assert client.chat.completions.create(model="demo", messages=FRANCE).choices[0].message.content == PARIS
    chunks = client.chat.completions.create(model="demo", messages=FRANCE, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == PARIS


def test_probes_and_metrics_are_its_own(routed: Routed) -> None:
    assert [routed.get(path).status_code for path in ("/livez", "/readyz", "/health")] == [200] * 3
    assert metric(routed.url, "quire:router_backend_up") == 1
    before = metric(routed.url, "quire:router_answers_total")
    routed.post("/v1/completions", json=STORY)
    assert metric(routed.url, "quire:router_answers_total") == before + 1


def test_the_servers_load_is_heard(routed: Routed, live: Live) -> None:
    answer = live.post("/v1/completions", json=STORY)
    parts = dict(part.strip().split("=") for part in answer.headers["x-engine-load"].split(","))
    assert (
        parts.keys() == {"queued_tokens", "running", "kv_use", "kv_tokens"} and int(parts["kv_tokens"]) > 1000
    )
    assert "x-engine-load" in live.get("/load").headers
    routed.post("/v1/completions", json=STORY)
    assert routed.site.forwarder.router.index.capacities == [int(parts["kv_tokens"]) // 128]


def test_bodies_are_bounded(live: Live) -> None:
    with routing(live.url, max_request_bytes=1000) as routed:
        assert routed.post("/v1/completions", json={**STORY, "prompt": "a" * 1000}).status_code == 413


def test_keys_are_forwarded_and_checked_if_it_has_some(service: InProcess) -> None:
    with serving(service, api_key=("sesame",)) as guarded, routing(guarded.url) as open_router:
        assert open_router.get("/v1/models").status_code == 401
        assert open_router.get("/v1/models", headers={"authorization": "Bearer sesame"}).status_code == 200
        with routing(guarded.url, api_key=("sesame",)) as own:
            assert own.get("/metrics").status_code == 401
            assert own.get("/v1/models", headers={"authorization": "Bearer sesame"}).status_code == 200
            assert own.get("/readyz").status_code == 200


def test_the_command_says_where_it_listens_and_stops_at_a_signal(live: Live) -> None:
    command = [sys.executable, "-m", "quire.cli.main", "router", "--port", "0", "--backend", live.url]
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline() for _ in range(2)]
        assert live.url in lines[0]
        url = lines[1].split()[2].removesuffix("/v1")
        assert httpx.post(f"{url}/v1/completions", json=STORY, timeout=60).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.mark.parametrize("stream", [False, True])
def test_another_server_is_asked_when_one_refuses_or_is_not_there(live: Live, stream: bool) -> None:
    refusing = Manners(refuse=dict.fromkeys(range(100), (503, RETRY_AT_ONCE)))
    with peer(refusing) as bad, peer(Manners()) as ended:
        gone = url_of(ended)
    with peer(refusing) as bad, routing(url_of(bad), live.url) as routed:
        for _ in range(30):  # each goes to either first, by chance
            assert routed.post("/v1/completions", json={**STORY, "stream": stream}).status_code == 200
        assert bad.bodies, "it was never asked"
    with routing(gone, live.url) as routed:
        assert routed.post("/v1/completions", json={**STORY, "stream": stream}).status_code == 200


def test_the_last_refusal_is_passed_on(live: Live) -> None:
    manners = Manners(refuse=dict.fromkeys(range(100), (503, RETRY_AT_ONCE)))
    with peer(manners) as bad, routing(url_of(bad)) as routed:
        for _ in range(3):
            answer = routed.post("/v1/completions", json=STORY)
            assert (answer.status_code, answer.json()) == (503, RETRY_AT_ONCE)
        answer = routed.post("/v1/completions", json=STORY)
        assert answer.status_code == 503 and "no replica" in answer.text
        assert int(answer.headers["retry-after"]) >= 1
        assert len(bad.bodies) == 3, "the circuit is open"
        assert routed.get("/readyz").status_code == 503


def test_a_request_that_kills_engines_is_not_tried_again() -> None:
    verdict = {"error": {"message": "it died", "type": "x", "param": None, "code": "engine_crash"}}
    with peer(Manners(refuse={0: (500, verdict)})) as one, peer(Manners(refuse={0: (500, verdict)})) as two:
        with routing(url_of(one), url_of(two)) as routed:
            assert routed.post("/v1/completions", json=STORY).json() == verdict
        assert len(one.bodies) + len(two.bodies) == 1


def test_a_stream_of_another_kind_of_server_ends_with_an_error_event() -> None:
    with peer(Manners(break_off={0})) as found, routing(url_of(found)) as routed:
        lines = routed.post("/v1/completions", json=STREAM).text.strip().split("\n\n")
        assert json.loads(lines[0][6:])["choices"][0]["text"] == " 0"
        assert json.loads(lines[-2][6:])["error"]["code"] == 503
        assert lines[-1] == "data: [DONE]"
        assert metric(routed.url, "quire:router_lost_total") == 1
        assert "[DONE]" in routed.post("/v1/completions", json=STREAM).text, "the next one is served"


def pieces_of(live: Live, path: str, body: dict[str, object]) -> list[str]:
    """A stream cut behind each comment."""
    answer = live.post(path, json=body, headers={**ID, ASKED: "1"})
    assert int(answer.headers[ASKED]) > 0
    return re.split(r"(?<=\n\n)(?=data: .*\n\n)", answer.text)


def had(text: str) -> dict[str, list[dict[str, object]]]:
    """What comments tell, as a request takes it."""
    choices: dict[int, dict[str, object]] = {}
    prompts: list[dict[str, object]] = []
    for line in re.findall(r"(?m)^: tokens (.*)$", text):
        _, news, looked_up = json.loads(line)
        names = ("index", "cached_tokens", "missed_tokens")
        prompts += [dict(zip(names, prompt, strict=True)) for prompt in looked_up]
        for index, tokens, ended in news:
            choice = choices.setdefault(index, {"index": index, "token_ids": [], "ended": False})
            choice["token_ids"] += tokens
            choice["ended"] |= ended
    return {"choices": list(choices.values()), "prompts": prompts}


class StepByStep:
    """An engine that computes when somebody waits for its outputs: however busy the machine is, none are merged."""

    status = Status.READY

    def __init__(self, engine: Engine):
        self.engine, self.inputs, self.metrics = engine, engine.inputs, engine.metrics
        self.outputs: dict[str, deque[RequestOutput]] = {}

    async def stream(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        self.engine.add(request)
        outputs, finished = self.outputs.setdefault(request.id, deque()), False
        while not finished:
            while not outputs:
                for output in self.engine.step():
                    self.outputs[output.request_id].append(output)
            output = outputs.popleft()
            finished = output.finished
            yield output

    async def abort(self, request_id: str) -> None:
        self.engine.abort(request_id)


@pytest.fixture(scope="module")
def step_by_step(service: InProcess) -> Iterator[Live]:
    engine = Engine(service.engine.engine.config, offline=False)
    with serving(StepByStep(engine)) as live:
        yield live
    engine.close()


CHAT = {"messages": FRANCE, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "stream": True}
INTERRUPTED = {
    "greedy": ("/v1/completions", STREAM),
    "drawn without a seed": ("/v1/completions", {**STREAM, "temperature": 1.5}),
    "several": (
        "/v1/completions",
        {**STREAM, "prompt": ["Once upon", "a time"], "n": 2, "max_tokens": 6, "temperature": 1},
    ),
    "of several lengths": (
        "/v1/completions",
        {
            **STREAM,
            "prompt": ["Once upon", "a time"],
            "temperature": 1.0,
            "stop": ["s "],
            "seed": 0,
            "max_tokens": 60,
        },
    ),
    "log probabilities": ("/v1/completions", {**STREAM, "logprobs": 1}),
    "usage": ("/v1/completions", {**STREAM, "stream_options": {"include_usage": True}}),
    "echo": ("/v1/completions", {**STREAM, "echo": True}),
    "stop string": ("/v1/completions", {**STREAM, "max_tokens": 40, "stop": ["the s"]}),
    "chat": ("/v1/chat/completions", CHAT),
    "chat with log probabilities": ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2}),
}


def by_choice(text: str) -> dict[int, Any]:
    """All that a stream says, of each choice in its order; choices, and tokens at a time, may come in any way."""
    found: dict[int, Any] = {}
    for line in text.splitlines():
        if line.startswith("data: {"):
            event = json.loads(line[6:])
            for choice in event["choices"]:
                index = choice["index"]
                text, offsets, tokens, ends = found.setdefault(index, ("", [], [], []))
                said = choice.get("text", choice.get("delta", {}).get("content")) or ""
                offsets = offsets + (choice.get("logprobs") or {}).get("text_offset", [])
                ends = ends + [choice["finish_reason"]] * (choice["finish_reason"] is not None)
                found[index] = (text + said, offsets, tokens + (choice.get("token_ids") or []), ends)
            if not event["choices"]:
                found[-1] = event["usage"]
    return found


@pytest.mark.parametrize("name", INTERRUPTED)
def test_a_stream_goes_on_elsewhere_where_it_was_cut(step_by_step: Live, live: Live, name: str) -> None:
    path, body = INTERRUPTED[name]
    whole = "".join(pieces_of(step_by_step, path, body))
    ends = [m.end() for m in re.finditer(r"(?m)^: tokens \[false.*\n\n", whole)]
    assert len(ends) >= 3
    assert (
        name != "of several lengths"
        or [c["ended"] for c in had(whole[: ends[-1]])["choices"]].count(True) == 1
    )
    created = int(re.search(r'"created":(\d+)', whole)[1])
    for end in (ends[0], ends[len(ends) // 2], ends[-1]):
        before = whole[:end]
        resume = {"created": created, **had(before)}
        rest = live.post(path, json={**body, "resume": resume}, headers={**ID, ASKED: "1"})
        assert rest.status_code == 200, rest.text
        assert by_choice(before + rest.text) == by_choice(whole)
        ids = {
            (json.loads(line[6:])["id"], json.loads(line[6:])["created"])
            for line in rest.text.splitlines()
            if line.startswith("data: {")
        }
        assert ids == {(json.loads(whole.split("\n")[0][6:])["id"], created)}


def test_a_prompt_is_told_of_once_it_has_been_looked_up() -> None:
    """The first sequence's first event says what was found; the second's may come before."""

    async def outputs() -> AsyncGenerator[tuple[int, RequestOutput], None]:
        for found in (CacheMisses(), CacheMisses(tail=1), CacheMisses(tail=1)):
            news = [CompletionOutput(index, "a", [5]) for index in range(2)]
            yield 0, RequestOutput("x", None, [1], news, False, cache_misses=found)

    async def write(outputs: AsyncGenerator[tuple[int, RequestOutput], None]) -> AsyncGenerator[bytes, None]:
        async for _ in outputs:
            yield b""

    async def comments() -> list[Told]:
        return [Told.read(piece[len(COMMENT) :]) async for piece in told(write, 2, 1)(outputs())]

    assert [each.prompts for each in asyncio.run(comments())] == [[], [(0, 0, {"tail": 1})], []]


BEGUN = {"choices": [{"index": 0, "token_ids": [5]}]}


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ({"choices": [{"index": 1, "token_ids": []}]}, "from 0 to 0"),
        ({"choices": [{"index": 0, "token_ids": []}] * 2}, "each once"),
        ({"choices": [{"index": 0, "token_ids": [10**6]}]}, "token id"),
        ({"choices": [{"index": 0, "token_ids": [-1]}]}, "token id"),
        ({"choices": [{"index": 0, "token_ids": [5] * 12}]}, "at most 12"),
        ({"choices": [{"index": 0, "token_ids": [5], "ended": True}]}, "nothing left"),
        ({"choices": [{"index": 0, "token_ids": ["5"]}]}, "integer"),
        ({**BEGUN, "prompts": [{"index": 0, "cached_tokens": 1, "missed_tokens": {"new": 1}}]}, "of all"),
        ({**BEGUN, "prompts": [{"index": 0, "cached_tokens": 99, "missed_tokens": {"new": -80}}]}, "of all"),
        ({**BEGUN, "prompts": [{"index": 0, "cached_tokens": -1, "missed_tokens": {}}]}, "equal to 0"),
    ],
)
def test_what_no_stream_can_have_had_is_refused(live: Live, resume: dict[str, object], message: str) -> None:
    answer = live.post("/v1/completions", json={**STREAM, "resume": resume})
    assert answer.status_code == 400 and message in answer.text
    assert live.post("/v1/completions", json={**STORY, "resume": {"choices": []}}).status_code == 400


def test_a_server_that_stops_hands_its_streams_over(service: InProcess) -> None:
    body = {**STREAM, "max_tokens": 300, "stream_options": {"include_usage": True}}
    with serving(service) as one, serving(service) as two, routing(one.url, two.url) as routed:
        with ExitStack() as stack:
            client = stack.enter_context(httpx.Client(timeout=60))
            answer = stack.enter_context(client.stream("POST", f"{routed.url}/v1/completions", json=body))
            lines = answer.iter_lines()
            begun = [next(lines) for _ in range(6)]
            (busy,) = [server for server in (one, two) if server.front.num_calls]
            busy.drain(0.0).result(30)
            text = "\n".join([*begun, *lines])
        moved, whole = by_choice(text), by_choice(routed.post("/v1/completions", json=body).text)
        usage, _ = moved.pop(-1), whole.pop(-1)
        assert moved == whole != {}
        looked_up = usage["prompt_tokens_details"]
        known = looked_up["cached_tokens"] + sum(looked_up["missed_tokens"].values())
        assert known == usage["prompt_tokens"] > 0
        assert metric(routed.url, "quire:router_replays_total") == 1
        routed.poll()
        busy_state = routed.site.forwarder.router.replicas[(one, two).index(busy)].state
        assert busy_state.value == "draining"
        for _ in range(4):
            assert routed.post("/v1/completions", json=STORY).status_code == 200
