"""Counts and times of an engine, under vLLM's metric names, in a Prometheus registry of the engine's own.

Steps are observed where the engine is kept, requests where their text is. In a server with several frontends these
are different processes, each with a `Metrics` of its own, and a scrape adds them up.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Metric

from quire.config import Config
from quire.engine.families import Families, Number, Tally
from quire.log import logger
from quire.types import MISS_REASONS, CacheMisses, FinishReason, Request, RequestMetrics

LOG_EVERY_S = 10.0
FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_GAP_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
STEP_TOKENS = tuple(float(2**i) for i in range(15))
TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5)) + (1e6,)
FEW = (1.0, 2.0, 5.0, 10.0, 20.0)
TIMES = {
    "time_to_first_token_seconds": ("From arrival to the first token", FIRST_TOKEN_S),
    "inter_token_latency_seconds": ("Between two tokens of a sequence", TOKEN_GAP_S),
    "request_time_per_output_token_seconds": ("Between a request's first token and its last", TOKEN_GAP_S),
    "e2e_request_latency_seconds": ("From arrival to the end", REQUEST_S),
    "request_queue_time_seconds": ("From arrival to the first step", REQUEST_S),
    "request_prefill_time_seconds": ("From the first step to the first token", REQUEST_S),
    "request_decode_time_seconds": ("From the first token to the last", REQUEST_S),
    "request_inference_time_seconds": ("From the first step to the last token", REQUEST_S),
}
SIZES = {
    "request_prompt_tokens": ("Prompt tokens of a request", TOKENS),
    "request_prefill_kv_computed_tokens": ("Prompt tokens that were not found in the cache", TOKENS),
    "request_generation_tokens": ("Tokens of all sequences of a request", TOKENS),
    "request_max_num_generation_tokens": ("Tokens of a request's longest sequence", TOKENS),
    "request_params_max_tokens": ("max_tokens of requests that gave it", TOKENS),
    "request_params_n": ("Sequences of a request", FEW),
    "request_num_preemptions": ("Times that a request gave up its blocks", (0.0, *FEW)),
}


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
    prefill_tokens: int = 0  # of the batched ones: no sequence's newest token
    num_parked: int = 0  # of those waiting: for a block that another sequence computes
    num_generated: int = 0  # tokens
    cache_misses: CacheMisses = CacheMisses()  # prompt tokens not found


NOTHING = StepStats(0, 0, 0, 0, 0, 0, 0, 0)
STEP_FIELDS = [each.name for each in dataclasses.fields(StepStats)]


def added(stats: Iterable[StepStats]) -> StepStats:
    """How several engines stand together."""
    rows = [[getattr(each, name) for name in STEP_FIELDS] for each in stats]
    return StepStats(*(sum(rest, first) for first, *rest in zip(*rows, strict=True))) if rows else NOTHING


class Metrics:
    """Observes steps and requests; `snapshot` reads everything back.

    Attributes:
        registry: what a Prometheus exporter reads.
        families: by name; whoever has more to count adds families of its own.
        requests: what happens to requests.
        totals: the latest step's.
        engines: those of all engine groups, this one's first.
        num_cache_tokens: that the KV cache holds; 0 if nobody said.
    """

    def __init__(self, model: str, *, log_stats: bool, first: "Metrics | None" = None):
        """`first`: those of the first engine group, if this is about steps of another one."""
        self.log_stats = log_stats
        number = 0 if first is None else len(first.engines)
        self.families = Families({"model_name": model, "engine": str(number)})
        self.steps = StepCounts(self.families)
        self.engines: list[Metrics] = [self]
        if first is None:
            self.registry, self.requests = CollectorRegistry(), RequestCounts(self.families)
            self.registry.register(self.families)
        else:
            self.registry, self.requests = first.registry, first.requests
            self.steps.saturation, self.steps.rejections = first.steps.saturation, first.steps.rejections
            first.families.others.append(self.families)
            first.engines.append(self)
        self.totals, self.window = NOTHING, Window()
        self.num_cache_tokens = 0

    def rename(self, model: str) -> None:
        """The name under which the model is served."""
        for each in self.engines:
            each.families.shared["model_name"] = model

    def step(self, stats: StepStats, now: float) -> None:
        """Observe one step."""
        last, self.totals = self.totals, stats
        self.steps.observe(stats, last)
        if self.log_stats:
            self.window.prompt_tokens += stats.cache_queries - last.cache_queries
            self.window.generated_tokens += stats.num_generated - last.num_generated
            self._log(now)

    def restarted(self, now: float) -> None:
        """Observe that the engine was lost; the next one's totals begin at 0."""
        self.steps.restarts.value += 1
        lost = dataclasses.replace(
            self.totals, num_running=0, num_waiting=0, num_parked=0, used_blocks=0, batched_tokens=0
        )
        self.step(lost, now)
        self.totals = NOTHING

    def replayed(self, count: int) -> None:
        """Observe requests that go on in a new engine."""
        self.steps.replays.value += count

    def rejected(self, reason: str) -> None:
        """Observe a request that was refused because of the load; `reason` is a limit's name."""
        self.steps.rejections.number(reason).value += 1

    def saturated(self, num_requests: int, num_tokens: int, wait_s: float) -> None:
        """What waits now, and how long one that came last would."""
        saturation = self.steps.saturation
        saturation["requests"].value, saturation["tokens"].value = num_requests, num_tokens
        saturation["seconds"].value = wait_s

    def configured(self, config: Config, num_blocks: int) -> None:
        """Facts about the cache, as labels of `vllm:cache_config_info`."""
        self.num_cache_tokens = (config.block_size or 0) * num_blocks
        facts = {
            "block_size": config.block_size,
            "num_gpu_blocks": num_blocks,
            "enable_prefix_caching": config.enable_prefix_caching,
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "kv_cache_memory_bytes": config.kv_cache_memory_bytes,
            "cache_dtype": config.dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
        }
        help, only = "Facts about the KV cache, as labels", frozenset({"engine"})
        info = self.families.gauge("vllm:cache_config_info", help, *facts, only=only)
        info.number(*map(str, facts.values())).value = 1

    def snapshot(self) -> list[Counter | Gauge | Histogram]:
        """Every metric's current value."""
        found: list[Counter | Gauge | Histogram] = []
        for family in self.families.collect():
            if family.type == "gauge":
                found += [Gauge(s.name, s.labels, s.value) for s in family.samples]
            elif family.type == "counter":
                found += [Counter(s.name, s.labels, s.value) for s in family.samples]
            else:
                found += _histograms(family)
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


class StepCounts:
    """What steps tell, and what happens to the engine."""

    def __init__(self, families: Families):
        def gauge(name: str, help: str) -> Number:
            return families.gauge(name, help).number()

        def counter(name: str, help: str) -> Number:
            return families.counter(name, help).number()

        self.running = gauge("vllm:num_requests_running", "Sequences that take part in steps")
        self.waiting = gauge("vllm:num_requests_waiting", "Sequences that wait for a seat or for blocks")
        reasons = families.gauge(
            "vllm:num_requests_waiting_by_reason",
            "capacity: for a seat or blocks; deferred: for a block that another sequence computes",
            "reason",
        )
        self.capacity, self.deferred = reasons.number("capacity"), reasons.number("deferred")
        self.usage = gauge("vllm:kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1")
        self.totals = {
            name: counter(f"vllm:{metric}", help)
            for name, metric, help in (
                ("cache_queries", "prefix_cache_queries", "Prompt tokens looked up in the prefix cache"),
                ("cache_hits", "prefix_cache_hits", "Prompt tokens found in the prefix cache"),
                ("num_preemptions", "num_preemptions", "Sequences that gave up their blocks"),
            )
        }
        misses = families.counter(
            "quire:cache_miss_tokens",
            "Prompt tokens not found in the prefix cache. new: nobody is known to have computed them; evicted: they "
            "had to make room; unfinished: another request was computing them; stateless: no recurrent state was "
            "kept there; tail: they fill no block; unread: the request does not read the cache, or it is off",
            "reason",
        )
        self.misses = {reason: misses.number(reason) for reason in MISS_REASONS}
        self.batch = families.histogram(
            "vllm:iteration_tokens_total", "Tokens computed in a step", STEP_TOKENS
        ).tally()
        self.restarts = counter("quire:engine_restarts", "Times the engine died and was started again")
        self.replays = counter(
            "quire:requests_replayed", "Requests sent to a new engine, with the tokens they had"
        )
        self.rejections = families.counter(
            "vllm:admission_rejections",
            "Requests refused because of the load, by the limit that they met",
            "reason",
            only=frozenset({"model_name"}),
        )
        self.saturation = {
            unit: gauge(f"quire:saturation_queued_{unit}", help)
            for unit, help in (
                ("requests", "Requests that were admitted and take part in no step yet"),
                ("tokens", "Prompt tokens of requests that take part in no step yet"),
                ("seconds", "How long a request that comes now is expected to wait for its first step"),
            )
        }

    def observe(self, stats: StepStats, last: StepStats) -> None:
        """A step, and the one before it."""
        self.running.value, self.waiting.value = stats.num_running, stats.num_waiting
        self.capacity.value, self.deferred.value = stats.num_waiting - stats.num_parked, stats.num_parked
        self.usage.value = stats.used_blocks / max(stats.num_blocks, 1)
        for name, total in self.totals.items():
            total.value += getattr(stats, name) - getattr(last, name)
        if stats.cache_misses != last.cache_misses:
            for reason, total in self.misses.items():
                total.value += getattr(stats.cache_misses, reason) - getattr(last.cache_misses, reason)
        if stats.batched_tokens:
            self.batch.observe(stats.batched_tokens)


class RequestCounts:
    """What happens to requests, from their first token on."""

    def __init__(self, families: Families):
        counter, both = families.counter, TIMES | SIZES
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of requests that began").number()
        self.cached_tokens = counter("vllm:prompt_tokens_cached", "Those found in the prefix cache").number()
        sources = counter("vllm:prompt_tokens_by_source", "Prompt tokens by where they came from", "source")
        self.computed, self.hit = sources.number("local_compute"), sources.number("local_cache_hit")
        self.generated_tokens = counter("vllm:generation_tokens", "Tokens generated").number()
        self.success = counter("vllm:request_success", "Requests ended", "finished_reason")
        for reason in FinishReason:
            self.success.number(reason.value)
        self.tallies = {
            name: families.histogram(f"vllm:{name}", help, bounds).tally()
            for name, (help, bounds) in both.items()
        }
        self.gaps: Tally = self.tallies["inter_token_latency_seconds"]

    def began(self, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """Observe a request's first token."""
        self.prompt_tokens.value += num_prompt_tokens
        self.cached_tokens.value += num_cached_tokens
        self.hit.value += num_cached_tokens
        self.computed.value += num_prompt_tokens - num_cached_tokens
        self.tallies["request_prefill_kv_computed_tokens"].observe(num_prompt_tokens - num_cached_tokens)

    def token(self, gap_s: float | None) -> None:
        """Observe a generated token; `gap_s` is the time since the sequence's last one, if there was one."""
        self.generated_tokens.value += 1
        if gap_s is not None:
            self.gaps.observe(gap_s)

    def finished(
        self,
        request: Request,
        metrics: RequestMetrics,
        num_generated: Sequence[int],
        reason: str | None,
        now: float,
    ) -> None:
        """Observe the end of a request; `num_generated` has each sequence's tokens."""
        self.success.number(reason or FinishReason.ABORT.value).value += 1
        params, tallies = request.params, self.tallies
        first, last, seated = metrics.first_token_s, metrics.last_token_s, metrics.scheduled_s
        tallies["e2e_request_latency_seconds"].observe(now - metrics.arrival_s)
        tallies["request_prompt_tokens"].observe(len(request.prompt_token_ids))
        tallies["request_generation_tokens"].observe(sum(num_generated))
        tallies["request_max_num_generation_tokens"].observe(max(num_generated))
        tallies["request_params_n"].observe(params.n)
        tallies["request_num_preemptions"].observe(metrics.num_preemptions)
        if params.max_tokens is not None:
            tallies["request_params_max_tokens"].observe(params.max_tokens)
        if seated is not None:
            tallies["request_queue_time_seconds"].observe(seated - metrics.arrival_s)
        if first is None or last is None:
            return
        tallies["time_to_first_token_seconds"].observe(first - metrics.arrival_s)
        tallies["request_decode_time_seconds"].observe(last - first)
        if seated is not None:
            tallies["request_prefill_time_seconds"].observe(first - seated)
            tallies["request_inference_time_seconds"].observe(last - seated)
        if (longest := max(num_generated)) > 1:
            tallies["request_time_per_output_token_seconds"].observe((last - first) / (longest - 1))


@dataclass(slots=True)
class Window:
    """Tokens since the last log line."""

    since_s: float | None = None
    prompt_tokens: int = 0
    generated_tokens: int = 0


def _histograms(family: Metric) -> list[Counter | Gauge | Histogram]:
    found: dict[tuple[tuple[str, str], ...], Histogram] = {}
    for sample in family.samples:
        labels = {k: v for k, v in sample.labels.items() if k != "le"}
        key = tuple(sorted(labels.items()))
        one = found.setdefault(key, Histogram(family.name, labels, 0, 0.0))
        match sample.name.removeprefix(family.name):
            case "_bucket":
                one.buckets[sample.labels["le"]] = int(sample.value)
            case "_count":
                found[key] = dataclasses.replace(one, count=int(sample.value))
            case "_sum":
                found[key] = dataclasses.replace(one, sum=sample.value)
    return list(found.values())
