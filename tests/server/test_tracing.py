"""Spans of requests: what they hold, whose children they are, and that without them nothing changes."""

import asyncio
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from opentelemetry.sdk import trace as sdk
from opentelemetry.sdk.trace import export
from opentelemetry.sdk.trace.export import in_memory_span_exporter as memory

from quire.errors import ConfigError
from quire.server import app, tracing
from quire.server.frontend import Frontend
from quire.server.settings import ServerSettings
from quire.server.timing import Timing
from quire.server.tracing import Tracer
from tests.server.conftest import FRANCE, InProcess, Live, serving

CHAT = ("/v1/chat/completions", {"messages": FRANCE, "temperature": 0, "max_tokens": 40})
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
WAIT_S = 30.0


class Spans:
    """Where a server's spans end up."""

    def __init__(self) -> None:
        self.exporter = memory.InMemorySpanExporter()
        provider = sdk.TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(export.SimpleSpanProcessor(self.exporter))
        self.tracer = Tracer(provider, "demo")

    def take(self, number: int = 1) -> list[Any]:
        """So many spans; the last byte of an answer may be read before its span is written."""
        until(lambda: len(self.exporter.get_finished_spans()) >= number)
        found = list(self.exporter.get_finished_spans())
        self.exporter.clear()
        assert len(found) == number
        return found


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def spans() -> Spans:
    return Spans()


@pytest.fixture(scope="module")
def traced(service: InProcess, spans: Spans) -> Iterator[Live]:
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tracer, "to", lambda endpoint, model: spans.tracer)
            live = stack.enter_context(serving(service, otlp_traces_endpoint="http://127.0.0.1:9/v1/traces"))
        yield live


def test_a_request_has_a_span(traced: Live, spans: Spans) -> None:
    answer = traced.post(CHAT[0], json={**CHAT[1], "top_p": 0.5}, headers={"X-Request-Id": "mine"})
    (span,) = spans.take()
    usage, found = answer.json()["usage"], dict(span.attributes)
    assert span.name == "llm_request" and span.kind.name == "SERVER" and span.parent is None
    assert span.status.is_unset and span.resource.attributes["service.name"]
    latency = {name: found.pop(f"gen_ai.latency.{name}") for name in LATENCIES}
    assert found == {
        "gen_ai.request.id": "mine",
        "gen_ai.request.max_tokens": 40,
        "gen_ai.request.temperature": 0,
        "gen_ai.request.top_p": 0.5,
        "gen_ai.request.n": 1,
        "gen_ai.response.model": "demo",
        "gen_ai.usage.prompt_tokens": usage["prompt_tokens"],
        "gen_ai.usage.completion_tokens": usage["completion_tokens"],
        "gen_ai.usage.cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "gen_ai.usage.num_sequences": 1,
    }
    parts = latency["time_in_queue"] + latency["time_in_model_inference"]
    assert 0 < parts < latency["e2e"] == pytest.approx((span.end_time - span.start_time) / 1e9, abs=1e-3)
    assert abs(span.end_time - time.time_ns()) < 60e9


LATENCIES = ("time_in_queue", "time_to_first_token", "e2e", "time_in_model_prefill", "time_in_model_decode")
LATENCIES += ("time_in_model_inference",)


def test_a_stream_has_one_too_and_it_ends_with_the_stream(traced: Live, spans: Spans) -> None:
    body = {**CHAT[1], "stream": True, "stream_options": {"include_usage": True}}
    assert traced.post(CHAT[0], json=body).status_code == 200
    (span,) = spans.take()
    assert span.attributes["gen_ai.usage.completion_tokens"] == 8 and span.status.is_unset


def test_the_callers_span_is_the_parent(traced: Live, spans: Spans) -> None:
    traced.post(CHAT[0], json=CHAT[1], headers={"traceparent": PARENT, "tracestate": "a=b"})
    (span,) = spans.take()
    assert f"{span.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2] and span.parent.is_remote
    for wrong in ("nonsense", "00-0-0-01", "\xff"):
        traced.post(CHAT[0], json=CHAT[1], headers={"traceparent": wrong.encode("latin-1")})
        (span,) = spans.take()
        assert span.parent is None


def test_each_prompt_of_a_call_has_its_span(traced: Live, spans: Spans) -> None:
    body = {"prompt": ["one", "two of them", "three"], "max_tokens": 3, "n": 2, "temperature": 1, "seed": 1}
    assert traced.post("/v1/completions", json=body).status_code == 200
    found = spans.take(3)
    assert {span.attributes["gen_ai.usage.num_sequences"] for span in found} == {2}
    assert len({span.attributes["gen_ai.usage.prompt_tokens"] for span in found}) > 1
    assert [span.attributes["gen_ai.usage.completion_tokens"] for span in found] == [6, 6, 6]


def test_a_client_that_leaves_ends_its_span(traced: Live, spans: Spans) -> None:
    body = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{traced.url}/v1/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
    (span,) = spans.take()
    assert span.status.status_code.name == "ERROR"
    assert 0 < span.attributes["gen_ai.usage.completion_tokens"] < 400


def test_what_is_refused_has_no_span(traced: Live, spans: Spans) -> None:
    assert traced.post(CHAT[0], json={"messages": 1}).status_code == 400
    assert traced.get("/v1/models").status_code == 200
    traced.post(CHAT[0], json=CHAT[1])
    spans.take(1)


def test_a_tracer_that_fails_fails_nothing_else(
    traced: Live, spans: Spans, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    def broken(*_: object, **__: object) -> None:
        tried.append(1)
        raise RuntimeError("the disk is full of spans")

    monkeypatch.setattr(spans.tracer, "_write", broken)
    with caplog.at_level(logging.WARNING, "quire"):
        assert traced.post(CHAT[0], json=CHAT[1]).status_code == 200
        assert traced.post(CHAT[0], json={**CHAT[1], "stream": True}).text.endswith("data: [DONE]\n\n")
        until(lambda: len(tried) == 2)  # of the stream too, after its last byte was read
    assert caplog.text.count("spans cannot be written") <= 1  # warned of once


def test_without_the_option_there_is_no_tracer(service: InProcess, live: Live) -> None:
    front = Frontend(service, ServerSettings(served_model_name=("demo",)))
    assert front.tracer is None and live.front.tracer is None
    layers, layer = [], app.wrap(front)
    while not layers or layer is not layers[-1]:
        layers.append(layer)
        layer = vars(layer).get("app", layer)
    assert "Traced" not in [type(each).__name__ for each in layers]


class Slow(sdk.SpanProcessor):
    """Ends when it is let."""

    def __init__(self) -> None:
        self.ends = threading.Event()

    def shutdown(self) -> None:
        self.ends.wait(30)


def test_a_collector_that_is_slower_than_the_server_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "FLUSH_S", 0.01)
    provider, slow = sdk.TracerProvider(shutdown_on_exit=False), Slow()
    provider.add_span_processor(slow)
    asyncio.run(Tracer(provider, "demo").close())
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "quire-spans"]
    slow.ends.set()
    thread.join(30)
    assert not thread.is_alive()  # an exception in it would fail this test


def test_missing_packages_are_named(service: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    settings = ServerSettings(
        served_model_name=("demo",), otlp_traces_endpoint="http://127.0.0.1:9/v1/traces"
    )
    with pytest.raises(ConfigError, match=r"pip install 'quire\[tracing\]'"):
        Frontend(service, settings)


def test_an_endpoint_must_be_a_url() -> None:
    with pytest.raises(ConfigError, match="otlp_traces_endpoint"):
        ServerSettings(otlp_traces_endpoint="localhost:4317")


def test_spans_arrive_at_a_collector_before_the_server_stops() -> None:
    """And a collector that is gone holds nobody up."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    got: list[bytes] = []

    async def collect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        (length,) = [
            int(h.split(b":")[1]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length")
        ]
        got.append(await reader.readexactly(length))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(collect, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        tracer = Tracer.to(f"http://127.0.0.1:{port}/v1/traces", "m")
        tracer.tracer.start_span("one").end()
        await tracer.close()
        server.close()

    asyncio.run(main())
    found = ExportTraceServiceRequest.FromString(gunzipped(got[0])).resource_spans[0]
    assert found.scope_spans[0].spans[0].name == "one"
    assert {a.key: a.value.string_value for a in found.resource.attributes}["service.name"] == "quire"

    async def alone() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
            tracer = Tracer.to(f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces", "m")
            tracer.tracer.start_span("one").end()
            async with asyncio.timeout(WAIT_S):
                await tracer.close()

    asyncio.run(alone())


def gunzipped(body: bytes) -> bytes:
    import gzip

    return gzip.decompress(body) if body.startswith(b"\x1f\x8b") else body


def test_nothing_is_recorded_of_a_call_without_requests() -> None:
    spans = Spans()
    spans.tracer.record({"headers": [], "request_id": "x"}, Timing())
    assert not spans.exporter.get_finished_spans()
