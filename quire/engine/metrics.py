"""Counts and times of an engine, under vLLM's metric names, in a Prometheus registry of the engine's own."""

import dataclasses
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry
from prometheus_client import Counter as PromCounter
from prometheus_client import Gauge as PromGauge
from prometheus_client import Histogram as PromHistogram

from quire.log import logger
from quire.types import FinishReason, RequestMetrics

LOG_EVERY_S = 10.0
FIRST_TOKEN_S = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
TOKEN_GAP_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
STEP_TOKENS = tuple(float(2**i) for i in range(15))


@dataclass(frozen=True, slots=True)
class Counter:
    """A count that only grows."""

    name: str
    labels: dict[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Gauge:
    """A value of this moment."""

    name: str
    labels: dict[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Histogram:
    """Observations by upper bound (cumulative), their number and their sum."""

    name: str
    labels: dict[str, str]
    count: int
    sum: float
    buckets: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one step did and how the engine stands after it. Counts that grow are totals since the start."""

    num_running: int
    num_waiting: int
    used_blocks: int
    num_blocks: int
    batched_tokens: int
    num_preemptions: int
    cache_queries: int  # prompt tokens looked up
    cache_hits: int  # prompt tokens found


class Metrics:
    """Observes requests and steps; `snapshot` reads everything back."""

    def __init__(self, model: str, *, log_stats: bool):
        self.registry, self.log_stats, self.model = CollectorRegistry(), log_stats, model
        self.gauges = {
            name: PromGauge(f"vllm:{name}", help, ["model_name"], registry=self.registry).labels(model)
            for name, help in (
                ("num_requests_running", "Sequences that take part in steps"),
                ("num_requests_waiting", "Sequences that wait for a seat or for blocks"),
                ("kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1"),
            )
        }
        self.counters = {
            name: PromCounter(f"vllm:{name}", help, ["model_name"], registry=self.registry).labels(model)
            for name, help in (
                ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache"),
                ("prefix_cache_hits", "Prompt tokens found in the prefix cache"),
                ("num_preemptions", "Sequences that gave up their blocks"),
                ("prompt_tokens", "Prompt tokens of accepted requests"),
                ("generation_tokens", "Tokens generated"),
            )
        }
        self.histograms = {
            name: PromHistogram(
                f"vllm:{name}", help, ["model_name"], buckets=b, registry=self.registry
            ).labels(model)
            for name, help, b in (
                ("time_to_first_token_seconds", "From arrival to the first token", FIRST_TOKEN_S),
                ("inter_token_latency_seconds", "Between two tokens of a sequence", TOKEN_GAP_S),
                ("e2e_request_latency_seconds", "From arrival to the end", REQUEST_S),
                ("request_queue_time_seconds", "From arrival to the first step", REQUEST_S),
                ("iteration_tokens", "Tokens computed in a step", STEP_TOKENS),
            )
        }
        self.success = PromCounter(
            "vllm:request_success",
            "Requests ended",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        for name, help in (
            ("engine_restarts", "Times the engine died and was started again"),
            ("requests_replayed", "Requests sent to a new engine, with the tokens they had"),
        ):
            counter = PromCounter(f"quire:{name}", help, ["model_name"], registry=self.registry)
            self.counters[name] = counter.labels(model)
        self.totals = StepStats(0, 0, 0, 0, 0, 0, 0, 0)
        self.window = Window()

    def step(self, stats: StepStats, now: float) -> None:
        """Observe one step."""
        last, self.totals = self.totals, stats
        self.gauges["num_requests_running"].set(stats.num_running)
        self.gauges["num_requests_waiting"].set(stats.num_waiting)
        self.gauges["kv_cache_usage_perc"].set(stats.used_blocks / max(stats.num_blocks, 1))
        self.counters["prefix_cache_queries"].inc(stats.cache_queries - last.cache_queries)
        self.counters["prefix_cache_hits"].inc(stats.cache_hits - last.cache_hits)
        self.counters["num_preemptions"].inc(stats.num_preemptions - last.num_preemptions)
        if stats.batched_tokens:
            self.histograms["iteration_tokens"].observe(stats.batched_tokens)
        if self.log_stats:
            self._log(now)

    def restarted(self, now: float) -> None:
        """Observe that the engine was lost; the next one's totals begin at 0."""
        self.counters["engine_restarts"].inc()
        self.step(dataclasses.replace(self.totals, num_running=0, used_blocks=0, batched_tokens=0), now)
        self.totals = StepStats(0, 0, 0, 0, 0, 0, 0, 0)

    def replayed(self, count: int) -> None:
        """Observe requests that go on in a new engine."""
        self.counters["requests_replayed"].inc(count)

    def arrived(self, num_prompt_tokens: int) -> None:
        """Observe an accepted request."""
        self.counters["prompt_tokens"].inc(num_prompt_tokens)
        self.window.prompt_tokens += num_prompt_tokens

    def token(self, gap_s: float | None) -> None:
        """Observe a generated token; `gap_s` is the time since the sequence's last one, if there was one."""
        self.counters["generation_tokens"].inc()
        self.window.generated_tokens += 1
        if gap_s is not None:
            self.histograms["inter_token_latency_seconds"].observe(gap_s)

    def finished(self, metrics: RequestMetrics, reason: str | None, now: float) -> None:
        """Observe the end of a request."""
        self.success.labels(self.model, reason or FinishReason.ABORT.value).inc()
        if metrics.first_token_s is not None:
            self.histograms["time_to_first_token_seconds"].observe(metrics.first_token_s - metrics.arrival_s)
        if metrics.scheduled_s is not None:
            self.histograms["request_queue_time_seconds"].observe(metrics.scheduled_s - metrics.arrival_s)
        self.histograms["e2e_request_latency_seconds"].observe(now - metrics.arrival_s)

    def snapshot(self) -> list[Counter | Gauge | Histogram]:
        """Every metric's current value."""
        found: list[Counter | Gauge | Histogram] = []
        for family in self.registry.collect():
            if family.type == "gauge":
                found += [Gauge(s.name, s.labels, s.value) for s in family.samples]
            elif family.type == "counter":
                found += [
                    Counter(s.name, s.labels, s.value) for s in family.samples if s.name.endswith("_total")
                ]
            else:
                buckets = {s.labels["le"]: int(s.value) for s in family.samples if s.name.endswith("_bucket")}
                value = {s.name.removeprefix(family.name): s.value for s in family.samples}
                labels = {"model_name": self.model}
                found.append(Histogram(family.name, labels, int(value["_count"]), value["_sum"], buckets))
        return found

    def _log(self, now: float) -> None:
        window = self.window
        if window.since_s is None:
            window.since_s = now
        elapsed = now - window.since_s
        if elapsed < LOG_EVERY_S:
            return
        stats = self.totals
        logger.info(
            "prompt %.0f tok/s, generation %.1f tok/s, running %d, waiting %d, KV %.1f %%, prefix hits %.1f %%",
            window.prompt_tokens / elapsed,
            window.generated_tokens / elapsed,
            stats.num_running,
            stats.num_waiting,
            100 * stats.used_blocks / max(stats.num_blocks, 1),
            100 * stats.cache_hits / max(stats.cache_queries, 1),
        )
        self.window = Window(since_s=now)


@dataclass(slots=True)
class Window:
    """Tokens since the last log line."""

    since_s: float | None = None
    prompt_tokens: int = 0
    generated_tokens: int = 0
