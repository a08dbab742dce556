"""Figures from timed requests, against numpy and by hand."""

import random
from itertools import accumulate
from typing import Any

import numpy as np
import pytest

from quire.cli.report import (
    Timed,
    details,
    figures,
    parse_goodput,
    parse_metrics,
    parse_percentiles,
    peak_concurrency,
    peak_tokens_per_s,
    percentile,
    table,
)
from quire.errors import ConfigError

ALL = ["ttft", "tpot", "itl", "e2el"]
KEYS = {  # what vLLM's `bench serve` writes
    "duration",
    "completed",
    "failed",
    "total_input_tokens",
    "total_output_tokens",
    "request_throughput",
    "request_goodput",
    "output_throughput",
    "total_token_throughput",
    "max_output_tokens_per_s",
    "max_concurrent_requests",
} | {f"{what}_{name}_ms" for what in ("mean", "median", "std", "p50", "p99.9") for name in ALL}


def timed(start: float, *times: float, **more: Any) -> Timed:
    return Timed(due=start, start=start, times=list(times), **{"output_len": len(times), **more})


def run(
    requests: list[Timed], duration: float = 10.0, metrics: list[str] = ALL, **goodput: float
) -> dict[str, Any]:
    return figures(
        requests, begin=0.0, duration=duration, metrics=metrics, percents=[50, 99.9], goodput=goodput
    )


def some_requests(seed: int, count: int = 50) -> list[Timed]:
    chance = random.Random(seed)
    made = []
    for i in range(count):
        gaps = [chance.random() for _ in range(chance.randint(1, 20))]
        made.append(timed(i, *(i + t for t in accumulate(gaps)), input_len=chance.randint(1, 9)))
    return made


@pytest.mark.parametrize("size", [1, 2, 3, 10, 101])
def test_percentiles_are_numpys(size: int) -> None:
    chance = random.Random(size)
    values = sorted(chance.expovariate(1) for _ in range(size))
    for percent in (0, 1, 25, 50, 90, 99, 99.9, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_figures_are_numpys() -> None:
    requests = some_requests(0)
    found = run(requests)
    ttft = np.array([r.times[0] - r.start for r in requests]) * 1e3
    e2el = np.array([r.times[-1] - r.start for r in requests]) * 1e3
    itl = np.concatenate([np.diff(r.times) for r in requests]) * 1e3
    many = [r for r in requests if len(r.times) > 1]
    tpot = np.array([(r.times[-1] - r.times[0]) / (len(r.times) - 1) for r in many]) * 1e3
    for name, values in (("ttft", ttft), ("e2el", e2el), ("itl", itl), ("tpot", tpot)):
        assert found[f"mean_{name}_ms"] == pytest.approx(values.mean())
        assert found[f"median_{name}_ms"] == pytest.approx(np.median(values))
        assert found[f"std_{name}_ms"] == pytest.approx(values.std())
        assert found[f"p99.9_{name}_ms"] == pytest.approx(np.percentile(values, 99.9))


def test_keys_are_vllms() -> None:
    assert run(some_requests(0)).keys() == KEYS | {"refused"}
    only_ttft = run(some_requests(0), metrics=["ttft"])
    assert {key for key in only_ttft if key.endswith("_ms")} == {key for key in KEYS if "_ttft_" in key}
    assert details([]).keys() == {
        "input_lens",
        "output_lens",
        "start_times",
        "ttfts",
        "itls",
        "generated_texts",
        "errors",
    }


def test_refusals_are_no_failures() -> None:
    statuses = [429, 503, 503, 400, 500, 504, 0]  # 0: no answer at all
    requests = [timed(0.0, 1.0, status=200), *(timed(0.0, error="x", status=status) for status in statuses)]
    found = run(requests)
    assert (found["completed"], found["refused"], found["failed"]) == (1, 3, 4)
    lines = table(found, metrics=[], percents=[], max_concurrency=None, request_rate=float("inf"))
    assert "Refused requests (429, 503):             3         " in lines
    found = run(requests[:1])
    lines = table(found, metrics=[], percents=[], max_concurrency=None, request_rate=float("inf"))
    assert not any("Refused" in line for line in lines)  # vLLM's table has no such line


def test_totals_by_hand() -> None:
    requests = [
        timed(0.0, 1.0, 1.5, 2.0, input_len=4),
        timed(1.0, 3.0, input_len=6),
        timed(1.0, 1.1, input_len=100, error="refused"),
    ]
    found = run(requests, duration=4.0)
    assert (found["completed"], found["failed"]) == (2, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (10, 4)
    assert (found["request_throughput"], found["output_throughput"]) == (0.5, 1.0)
    assert found["total_token_throughput"] == 3.5
    assert found["request_goodput"] is None
    assert (found["mean_ttft_ms"], found["mean_tpot_ms"], found["mean_itl_ms"]) == (1500, 500, 500)
    assert found["max_concurrent_requests"] == 2
    assert found["max_output_tokens_per_s"] == 2


def test_several_tokens_in_a_piece_count_for_the_time_of_each_but_are_one_gap() -> None:
    found = run([timed(0.0, 1.0, 2.0, output_len=11)])
    assert (found["mean_tpot_ms"], found["mean_itl_ms"]) == (pytest.approx(100), 1000)


def test_nothing_completed_is_zeros() -> None:
    for requests in ([], [timed(0.0, error="refused")]):
        found = run(requests)
        assert found["completed"] == 0
        assert not any(value for key, value in found.items() if key.endswith("_ms"))


def test_goodput_counts_requests_within_every_limit() -> None:
    quick, late, slow = timed(0.0, 0.1, 0.2), timed(0.0, 0.5, 0.6), timed(0.0, 0.1, 0.9)
    requests = [quick, late, slow, timed(0.0, 0.1, 0.2, error="failed")]
    assert run(requests, ttft=200.0)["request_goodput"] == pytest.approx(0.2)
    assert run(requests, tpot=150.0)["request_goodput"] == pytest.approx(0.2)
    assert run(requests, ttft=200.0, tpot=150.0)["request_goodput"] == pytest.approx(0.1)
    assert run(requests, e2el=50.0)["request_goodput"] == 0
    assert run(requests, e2el=1000.0)["request_goodput"] == pytest.approx(0.3)


def test_one_token_has_no_time_per_further_token() -> None:
    found = run([timed(0.0, 1.0), timed(0.0, 1.0, 3.0)], tpot=1.0)
    assert found["mean_tpot_ms"] == 2000
    assert found["request_goodput"] == pytest.approx(0.1)


def test_peaks() -> None:
    assert peak_concurrency([timed(0.0, 1.0), timed(1.0, 2.0), timed(1.5, 1.6)]) == 2
    assert peak_concurrency([]) == 0
    assert peak_tokens_per_s([timed(5.0, 5.2, 5.9, 6.1), timed(5.5, 6.2, 6.3)], begin=5.0) == 3
    assert peak_tokens_per_s([timed(0.0, 0.5, 1.5, 1.6, output_len=9)], begin=0.0) == 6
    assert peak_tokens_per_s([], begin=0.0) == 0


def test_time_in_the_clients_queue() -> None:
    request = Timed(due=1.0, start=3.0, times=[4.0], output_len=1)
    found = run([request], metrics=["client_queue_time", "ttft"])
    assert (found["mean_client_queue_time_ms"], found["mean_ttft_ms"]) == (2000, 1000)


def test_the_table_is_vllms() -> None:
    found = run([timed(0.0, 1.0, 2.0, input_len=3)], ttft=5000.0, metrics=["ttft"])
    rows = table(found, metrics=["ttft"], percents=[50, 99.9], max_concurrency=4, request_rate=2.5)
    assert rows == [
        "============ Serving Benchmark Result ============",
        "Successful requests:                     1         ",
        "Failed requests:                         0         ",
        "Maximum request concurrency:             4         ",
        "Request rate configured (RPS):           2.50      ",
        "Benchmark duration (s):                  10.00     ",
        "Total input tokens:                      3         ",
        "Total generated tokens:                  2         ",
        "Request throughput (req/s):              0.10      ",
        "Request goodput (req/s):                 0.10      ",
        "Output token throughput (tok/s):         0.20      ",
        "Peak output token throughput (tok/s):    1.00      ",
        "Peak concurrent requests:                1         ",
        "Total token throughput (tok/s):          0.50      ",
        "---------------Time to First Token----------------",
        "Mean TTFT (ms):                          1000.00   ",
        "Median TTFT (ms):                        1000.00   ",
        "Std TTFT (ms):                           0.00      ",
        "P50 TTFT (ms):                           1000.00   ",
        "P99.9 TTFT (ms):                         1000.00   ",
        "==================================================",
    ]


def test_words_are_parsed() -> None:
    assert parse_goodput(["ttft:200", "e2el:1.5"]) == {"ttft": 200.0, "e2el": 1.5}
    assert parse_metrics("ttft,client_queue_time") == ["ttft", "client_queue_time"]
    assert parse_percentiles("50,99.9") == [50, 99.9]


@pytest.mark.parametrize("word", ["ttft", "ttft:", "ttft:soon", "itl:5", "ttft:-1", "ttft:nan"])
def test_goodput_that_is_none_is_named(word: str) -> None:
    with pytest.raises(ConfigError, match=f"goodput has '{word}'"):
        parse_goodput([word])


@pytest.mark.parametrize("text", ["", "50,", "101", "-1", "nan"])
def test_percentiles_that_are_none_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match=f"metric_percentiles is '{text}'"):
        parse_percentiles(text)


def test_metrics_that_are_none_are_named() -> None:
    with pytest.raises(ConfigError, match="percentile_metrics has 'speed'"):
        parse_metrics("ttft,speed")
