"""From timed requests to a benchmark's figures, table and JSON, by vLLM's names. Knows no network and no clock."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from quire.errors import ConfigError

METRICS = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
    "client_queue_time": ("CQT", "Client Queue Time"),
}
GOODPUT = ("ttft", "tpot", "e2el")
REFUSALS = (429, 503)
WIDTH = 50
LABEL = 40


@dataclass(slots=True, kw_only=True)
class Timed:
    """One request as the client saw it. Times are seconds of one clock.

    Attributes:
        due: when it was to be sent; with a limit on concurrency `start` may be later.
        times: when each piece of output arrived; a piece may have several tokens.
        status: of HTTP; 0 if there was no answer.
        retry_after: what the answer's header says, if it has one.
        error: why it failed; empty if it did not.
    """

    input_len: int = 0
    output_len: int = 0
    due: float = 0.0
    start: float = 0.0
    times: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    status: int = 0
    retry_after: str = ""
    error: str = ""

    @property
    def refused(self) -> bool:
        """The server had no room for it, and said so."""
        return self.status in REFUSALS

    @property
    def ttft(self) -> float:
        return self.times[0] - self.start if self.times else 0.0

    @property
    def e2el(self) -> float:
        """To the last piece of output, as vLLM counts; what follows it carries no text."""
        return self.times[-1] - self.start if self.times else 0.0

    @property
    def tpot(self) -> float:
        return (self.e2el - self.ttft) / (self.output_len - 1) if self.output_len > 1 else 0.0

    @property
    def itls(self) -> list[float]:
        return [after - before for before, after in pairwise(self.times)]

    @property
    def client_queue_time(self) -> float:
        return self.start - self.due

    @property
    def end(self) -> float:
        return self.start + self.e2el


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear between the two nearest, as numpy's default. `ordered` ascends; 0 if it is empty."""
    if not ordered:
        return 0.0
    at = (len(ordered) - 1) * percent / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def parse_goodput(words: Iterable[str]) -> dict[str, float]:
    """`ttft:200 tpot:50`, in milliseconds.

    Raises:
        ConfigError: not of this form, or no metric that a single request has.
    """
    limits: dict[str, float] = {}
    for word in words:
        name, _, text = word.partition(":")
        try:
            limits[name] = float(text)
        except ValueError:
            raise ConfigError(f"goodput has {word!r}; write NAME:MILLISECONDS, such as ttft:200") from None
        if name not in GOODPUT or not limits[name] >= 0:
            raise ConfigError(
                f"goodput has {word!r}; it must be a limit of at least 0 for {_either(GOODPUT)}"
            )
    return limits


def parse_metrics(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"percentile_metrics has {name!r}; it may have {_either(tuple(METRICS))}")
    return names


def parse_percentiles(text: str) -> list[float]:
    try:
        percents = [float(word) for word in text.split(",")]
    except ValueError:
        percents = [-1]
    if not all(0 <= percent <= 100 for percent in percents):
        raise ConfigError(f"metric_percentiles is {text!r}; it must be numbers from 0 to 100, such as 50,99")
    return percents


def meets(request: Timed, limits: Mapping[str, float]) -> bool:
    """Whether a completed request is within all limits, which are milliseconds."""
    found = {"ttft": request.ttft, "tpot": request.tpot, "e2el": request.e2el}
    return all(found[name] * 1e3 <= limit for name, limit in limits.items())


def peak_tokens_per_s(requests: Iterable[Timed], begin: float) -> float:
    """Most tokens that came within one second, counted in whole seconds since `begin`.

    A request's tokens are spread evenly over its pieces, as no piece says how many it has.
    """
    seconds: defaultdict[int, float] = defaultdict(float)
    for request in requests:
        pieces = Counter(int(time - begin) for time in request.times)
        for second, count in pieces.items():
            seconds[second] += count * request.output_len / len(request.times)
    return float(max(seconds.values(), default=0))


def peak_concurrency(requests: Iterable[Timed]) -> int:
    """Most requests between sending and last token at once. One that ends as another begins does not count."""
    changes = sorted(
        change
        for request in requests
        for change in ((request.start, 1), (max(request.end, request.start), -1))
    )
    peak = running = 0
    for _, change in changes:
        running += change
        peak = max(peak, running)
    return peak


def figures(
    requests: Sequence[Timed],
    *,
    begin: float,
    duration: float,
    metrics: Sequence[str],
    percents: Sequence[float],
    goodput: Mapping[str, float],
) -> dict[str, Any]:
    """What `--save-result` writes of the measurement, in the order that the table shows it.

    `refused` is ours: requests that the server had no room for, and said so; `failed` are all others without an answer.
    """
    done = [request for request in requests if not request.error]
    num_input = sum(request.input_len for request in done)
    num_output = sum(request.output_len for request in done)
    num_refused = sum(request.refused for request in requests)
    num_good = sum(meets(request, goodput) for request in done)
    found: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(requests) - len(done) - num_refused,
        "refused": num_refused,
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(done) / duration,
        "request_goodput": num_good / duration if goodput else None,
        "output_throughput": num_output / duration,
        "total_token_throughput": (num_input + num_output) / duration,
        "max_output_tokens_per_s": peak_tokens_per_s(done, begin),
        "max_concurrent_requests": peak_concurrency(done),
    }
    for name in metrics:
        found |= _spread(name, _values(done, name), percents)
    return found


def details(requests: Sequence[Timed]) -> dict[str, Any]:
    """One entry for each request, in the order of their sending."""
    return {
        "input_lens": [request.input_len for request in requests],
        "output_lens": [request.output_len for request in requests],
        "start_times": [request.start for request in requests],
        "ttfts": [request.ttft for request in requests],
        "itls": [request.itls for request in requests],
        "generated_texts": ["".join(request.texts) for request in requests],
        "errors": [request.error for request in requests],
    }


def _values(done: Sequence[Timed], name: str) -> list[float]:
    if name == "ttft":
        return [request.ttft for request in done]
    if name == "tpot":  # one token has no time per further token
        return [request.tpot for request in done if request.output_len > 1]
    if name == "itl":
        return [gap for request in done for gap in request.itls]
    if name == "e2el":
        return [request.e2el for request in done]
    return [request.client_queue_time for request in done]


def _spread(name: str, seconds: Iterable[float], percents: Sequence[float]) -> dict[str, float]:
    ordered = sorted(value * 1e3 for value in seconds)
    return {
        f"mean_{name}_ms": statistics.fmean(ordered) if ordered else 0.0,
        f"median_{name}_ms": percentile(ordered, 50),
        f"std_{name}_ms": statistics.pstdev(ordered) if ordered else 0.0,
    } | {f"p{percent:g}_{name}_ms": percentile(ordered, percent) for percent in percents}


def table(
    found: Mapping[str, Any],
    *,
    metrics: Sequence[str],
    percents: Sequence[float],
    max_concurrency: int | None,
    request_rate: float,
) -> list[str]:
    """vLLM's table, line by line."""
    lines = [
        f"{' Serving Benchmark Result ':=^{WIDTH}}",
        _row("Successful requests:", found["completed"]),
        _row("Failed requests:", found["failed"]),
    ]
    if found["refused"]:
        lines.append(_row("Refused requests (429, 503):", found["refused"]))
    if max_concurrency is not None:
        lines.append(_row("Maximum request concurrency:", max_concurrency))
    if request_rate < float("inf"):
        lines.append(_row("Request rate configured (RPS):", request_rate))
    lines += [
        _row("Benchmark duration (s):", found["duration"]),
        _row("Total input tokens:", found["total_input_tokens"]),
        _row("Total generated tokens:", found["total_output_tokens"]),
        _row("Request throughput (req/s):", found["request_throughput"]),
    ]
    if found["request_goodput"] is not None:
        lines.append(_row("Request goodput (req/s):", found["request_goodput"]))
    lines += [
        _row("Output token throughput (tok/s):", found["output_throughput"]),
        _row("Peak output token throughput (tok/s):", found["max_output_tokens_per_s"]),
        _row("Peak concurrent requests:", found["max_concurrent_requests"]),
        _row("Total token throughput (tok/s):", found["total_token_throughput"]),
    ]
    for name in metrics:
        short, long = METRICS[name]
        lines.append(f"{long:-^{WIDTH}}")
        for label, key in (("Mean", "mean"), ("Median", "median"), ("Std", "std")):
            lines.append(_row(f"{label} {short} (ms):", found[f"{key}_{name}_ms"]))
        for percent in percents:
            lines.append(_row(f"P{percent:g} {short} (ms):", found[f"p{percent:g}_{name}_ms"]))
    return [*lines, "=" * WIDTH]


def _row(label: str, value: float) -> str:
    return f"{label:<{LABEL}} {value:<10.2f}" if isinstance(value, float) else f"{label:<{LABEL}} {value:<10}"


def _either(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " or " + names[-1]
