"""OpenTelemetry: a span for each request, written when it has ended. What goes wrong here fails no request.

Where spans go is --otlp-traces-endpoint (OTLP over HTTP); the rest is the OpenTelemetry SDK's to read from its own
environment variables, such as OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER and OTEL_EXPORTER_OTLP_HEADERS.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from starlette.types import ASGIApp, Receive, Scope, Send

from quire import __version__
from quire.errors import ConfigError
from quire.log import logger, warn_once
from quire.server.timing import Timing
from quire.types import FinishReason, Request, RequestOutput

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

FLUSH_S = 1.0  # for the last spans, when the server stops
EXPORT_EVERY_MS = 1000
SPAN = "llm_request"
WELL = (FinishReason.STOP.value, FinishReason.LENGTH.value)


class Tracer:
    """Writes spans."""

    def __init__(self, provider: "TracerProvider", model: str):
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.provider, self.model = provider, model
        self.tracer = provider.get_tracer("quire", __version__)
        self.propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str, model: str) -> Self:
        """Spans go to a collector.

        Raises:
            ConfigError: the packages are not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(
                f"otlp_traces_endpoint is {endpoint!r}, and {error.name} is not installed: pip install 'quire[tracing]'"
            ) from None
        resource = Resource.create()
        if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "quire"}))
        logging.getLogger("opentelemetry.exporter").setLevel(
            logging.ERROR
        )  # it tells of each retry otherwise
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=endpoint)
        provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_EVERY_MS))
        return cls(provider, model)

    def record(self, scope: Scope, timing: Timing) -> None:
        """A call has ended, in whatever way: a span for each of its requests."""
        try:
            for number, request in enumerate(timing.requests):
                self._write(scope, request, timing.latest.get(number))
        except Exception:
            logger.debug("spans of request %s", scope["request_id"], exc_info=True)
            warn_once(logger, "spans cannot be written; QUIRE_LOG_LEVEL=DEBUG shows why")

    async def close(self) -> None:
        """Send what is left, and wait a little for that: the collector may be gone."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def flush() -> None:
            self.provider.shutdown()
            with suppress(RuntimeError):  # the loop is closed: nobody waited for so long
                loop.call_soon_threadsafe(done.set)

        threading.Thread(target=flush, name="quire-spans", daemon=True).start()
        try:
            await asyncio.wait_for(done.wait(), FLUSH_S)
        except TimeoutError:
            logger.warning("the last spans were not taken within %g s", FLUSH_S)

    def _write(self, scope: Scope, request: Request, output: RequestOutput | None) -> None:
        from opentelemetry.trace import SpanKind, StatusCode

        now = time.monotonic()
        epoch_ns = time.time_ns() - int(now * 1e9)  # of the monotonic clock
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        span = self.tracer.start_span(
            SPAN,
            context=self.propagator.extract(headers),
            kind=SpanKind.SERVER,
            start_time=epoch_ns + int(request.arrival_s * 1e9),
        )
        if span.is_recording():
            known = {
                **_of_request(request),
                **dict(_of_output(request, output)),
                "gen_ai.response.model": self.model,
            }
            known["gen_ai.request.id"] = scope["request_id"]
            known["gen_ai.latency.e2e"] = now - request.arrival_s
            span.set_attributes(known)
            if output is None or not all(o.finish_reason in WELL for o in output.outputs):
                span.set_status(StatusCode.ERROR, "the request was not finished")
        span.end(epoch_ns + int(now * 1e9))


class Traced:
    """Hands a call's timing to the tracer when the last byte of its answer is sent, or nobody wants it any more."""

    def __init__(self, app: ASGIApp, tracer: Tracer):
        self.app, self.tracer = app, tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        finally:
            timing = scope.get("timing")
            if timing is not None:
                self.tracer.record(scope, timing)


def _of_request(request: Request) -> dict[str, Any]:
    params = request.params
    asked = {
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "n": params.n,
    }
    return {f"gen_ai.request.{name}": value for name, value in asked.items() if value is not None}


def _of_output(request: Request, output: RequestOutput | None) -> Iterator[tuple[str, Any]]:
    yield "gen_ai.usage.prompt_tokens", len(request.prompt_token_ids)
    if output is None:
        yield "gen_ai.usage.completion_tokens", 0
        return
    metrics, latency = output.metrics, "gen_ai.latency"
    seated, first, last = metrics.scheduled_s, metrics.first_token_s, metrics.last_token_s
    yield "gen_ai.usage.completion_tokens", metrics.num_generated_tokens
    yield "gen_ai.usage.num_sequences", len(output.outputs)
    yield "gen_ai.usage.cached_tokens", output.num_cached_tokens
    if seated is not None:
        yield f"{latency}.time_in_queue", seated - request.arrival_s
    if first is not None and last is not None:
        yield f"{latency}.time_to_first_token", first - request.arrival_s
        yield f"{latency}.time_in_model_decode", last - first
        if seated is not None:
            yield f"{latency}.time_in_model_prefill", first - seated
            yield f"{latency}.time_in_model_inference", last - seated
