"""What metrics say about an engine: names, bounds and numbers that agree with what happened."""

import asyncio
import math
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from quire import LLM, AsyncEngine, Config, SamplingParams
from quire.engine.families import Families
from quire.engine.metrics import (
    FIRST_TOKEN_S,
    REQUEST_S,
    STEP_TOKENS,
    TOKEN_GAP_S,
    TOKENS,
    Metrics,
    StepStats,
)
from quire.types import CacheMisses, Request, RequestMetrics

PROMPT = "The same words again, and then again. " * 8
NAMES = [
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_waiting_by_reason",
    "kv_cache_usage_perc",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
    "prompt_tokens",
    "generation_tokens",
    "prompt_tokens_cached",
    "prompt_tokens_by_source",
    "request_success",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "request_params_max_tokens",
    "request_params_n",
    "request_prefill_kv_computed_tokens",
    "request_num_preemptions",
    "iteration_tokens_total",
    "cache_config_info",
    "admission_rejections",
]
OURS = ["engine_restarts", "requests_replayed", "cache_miss_tokens"]
OURS += [f"saturation_queued_{unit}" for unit in ("requests", "tokens", "seconds")]


def stats(**given: Any) -> StepStats:
    names = "num_running num_waiting used_blocks num_blocks batched_tokens num_preemptions cache_queries cache_hits"
    return StepStats(**{**dict.fromkeys(names.split(), 0), **given})


def values(metrics: Metrics) -> dict[str, float]:
    """By name and the values of labels other than the model's and the engine's."""
    found = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            own = [v for k, v in sample.labels.items() if k not in ("model_name", "engine")]
            found[" ".join([sample.name, *own])] = sample.value
    return found


def ran(
    *, n: int = 1, tokens: tuple[int, ...] = (5,), reason: str | None = "length", **times: float | None
) -> Metrics:
    metrics = Metrics("m", log_stats=False)
    request = Request(id="1", prompt_token_ids=(1,) * 30, params=SamplingParams(n=n, max_tokens=7))
    known = {"arrival_s": 10.0, "scheduled_s": 12.0, "first_token_s": 15.0, "last_token_s": 16.0, **times}
    metrics.requests.finished(request, RequestMetrics(**known), tokens, reason, 20.0)
    return metrics


def test_every_name_is_there_with_its_labels() -> None:
    metrics = Metrics("some model", log_stats=False)
    with LLM("demo") as llm:
        metrics.configured(llm.config, 12)
    families = {f.name: f for f in text_string_to_metric_families(generate_latest(metrics.registry).decode())}
    assert set(families) == {f"vllm:{name}" for name in NAMES} | {f"quire:{name}" for name in OURS}
    for name, family in families.items():
        for sample in family.samples:
            if name == "vllm:cache_config_info":
                assert sample.labels["num_gpu_blocks"] == "12" and sample.labels["engine"] == "0"
            else:
                assert sample.labels["model_name"] == "some model"
                assert sample.labels["engine"] == "0"
    ended = {s.labels["finished_reason"] for s in families["vllm:request_success"].samples}
    assert ended == {"stop", "length", "abort", "error"}  # at 0 from the beginning, so that rates are known
    metrics.rejected("max_num_queued_reqs")
    (refused,) = metrics.families.counter("vllm:admission_rejections", "").read({}).samples
    assert refused.value == 1 and refused.labels == {"reason": "max_num_queued_reqs"}


def test_bounds_are_vllms() -> None:
    assert (len(FIRST_TOKEN_S), FIRST_TOKEN_S[0], FIRST_TOKEN_S[-1]) == (22, 0.001, 2560)
    assert (len(TOKEN_GAP_S), TOKEN_GAP_S[0], TOKEN_GAP_S[-1]) == (19, 0.01, 80)
    assert (len(REQUEST_S), REQUEST_S[0], REQUEST_S[-1]) == (21, 0.3, 7680)
    assert STEP_TOKENS[-1] == 16384 and TOKENS[:4] == (1, 2, 5, 10) and TOKENS[-1] == 1e6
    for bounds in (FIRST_TOKEN_S, TOKEN_GAP_S, REQUEST_S, STEP_TOKENS, TOKENS):
        assert list(bounds) == sorted(set(bounds))


def test_a_bucket_holds_its_bound() -> None:
    families, registry = Families({"a": "b"}), CollectorRegistry()
    registry.register(families)
    tally = families.histogram("h", "help", (1.0, 2.0)).tally()
    for value in (0.5, 1.0, 1.5, 2.0, 3.0):
        tally.observe(value)
    assert families.histogram("h", "again", (5.0,)).tally() is tally
    (family,) = text_string_to_metric_families(generate_latest(registry).decode())
    found = {s.labels.get("le", s.name): s.value for s in family.samples}
    assert found == {"1.0": 2, "2.0": 4, "+Inf": 5, "h_count": 5, "h_sum": 8.0}


def test_steps_are_totals_and_moments() -> None:
    metrics, missed = Metrics("m", log_stats=False), CacheMisses(new=7, evicted=2)
    metrics.step(
        stats(
            num_running=3,
            num_waiting=5,
            num_parked=2,
            cache_queries=40,
            cache_misses=missed,
            batched_tokens=9,
        ),
        0.0,
    )
    metrics.step(stats(used_blocks=1, num_blocks=4, cache_queries=50, cache_hits=8, cache_misses=missed), 1.0)
    found = values(metrics)
    assert found["vllm:prefix_cache_queries_total"] == 50 and found["vllm:prefix_cache_hits_total"] == 8
    assert found["vllm:num_requests_running"] == 0 and found["vllm:kv_cache_usage_perc"] == 0.25
    assert found["quire:cache_miss_tokens_total new"] == 7
    assert found["quire:cache_miss_tokens_total evicted"] == 2
    assert found["vllm:iteration_tokens_total_count"] == 1 and found["vllm:iteration_tokens_total_sum"] == 9
    metrics.step(stats(num_waiting=5, num_parked=2, cache_queries=50, cache_hits=8, cache_misses=missed), 1.5)
    assert values(metrics)["vllm:num_requests_waiting_by_reason capacity"] == 3
    assert values(metrics)["vllm:num_requests_waiting_by_reason deferred"] == 2
    metrics.restarted(2.0)
    metrics.replayed(4)
    found = values(metrics)
    assert found["vllm:num_requests_waiting"] == 0 and found["quire:engine_restarts_total"] == 1
    assert found["quire:requests_replayed_total"] == 4
    metrics.step(stats(cache_queries=10), 3.0)  # the new engine's totals begin at 0
    assert values(metrics)["vllm:prefix_cache_queries_total"] == 60
    metrics.saturated(2, 300, 1.5)
    assert values(metrics)["quire:saturation_queued_seconds"] == 1.5


def test_a_finished_request_is_measured_in_parts() -> None:
    found = values(ran(n=2, tokens=(5, 2)))
    sums = {name: found[f"vllm:{name}_sum"] for name in NAMES if f"vllm:{name}_sum" in found}
    assert sums["request_queue_time_seconds"] == 2 and sums["request_prefill_time_seconds"] == 3
    assert sums["request_decode_time_seconds"] == 1 and sums["request_inference_time_seconds"] == 4
    assert sums["time_to_first_token_seconds"] == 5 and sums["e2e_request_latency_seconds"] == 10
    assert sums["request_time_per_output_token_seconds"] == 0.25
    assert sums["request_prompt_tokens"] == 30 and sums["request_generation_tokens"] == 7
    assert sums["request_max_num_generation_tokens"] == 5
    assert sums["request_params_n"] == 2 and sums["request_params_max_tokens"] == 7
    assert found["vllm:request_success_total length"] == 1


def test_what_never_began_has_no_parts() -> None:
    found = values(ran(tokens=(0,), reason=None, scheduled_s=None, first_token_s=None, last_token_s=None))
    assert (
        found["vllm:request_success_total abort"] == 1
        and found["vllm:e2e_request_latency_seconds_count"] == 1
    )
    for name in ("request_queue_time_seconds", "time_to_first_token_seconds", "request_decode_time_seconds"):
        assert found[f"vllm:{name}_count"] == 0
    assert found["vllm:request_time_per_output_token_seconds_count"] == 0


def test_an_engine_fills_all_of_them() -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    many = SamplingParams(n=2, max_tokens=4, ignore_eos=True)
    with LLM("demo", disable_log_stats=True) as llm:
        (first,) = llm.generate(PROMPT, params, use_tqdm=False)
        (again,) = llm.generate(PROMPT, params, use_tqdm=False)
        llm.generate(PROMPT, many, use_tqdm=False)
        llm.generate(PROMPT, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
        found = values(llm.engine.metrics)
        size, length = llm.config.block_size, len(first.prompt_token_ids)
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, (length - 1) // size * size)
    assert again.num_cached_tokens > 0 and again.metrics.num_generated_tokens == 8
    queries, hits = found["vllm:prefix_cache_queries_total"], found["vllm:prefix_cache_hits_total"]
    assert queries == 5 * length and hits == 3 * again.num_cached_tokens
    misses = {k.split()[1]: v for k, v in found.items() if k.startswith("quire:cache_miss_tokens")}
    tail = length - again.num_cached_tokens
    assert misses == {
        "new": again.num_cached_tokens,
        "evicted": 0,
        "unfinished": 0,
        "stateless": 0,
        "tail": 4 * tail,
        "unread": length,
    }
    assert first.cache_misses.by_reason() == {"new": again.num_cached_tokens, "tail": tail}
    assert again.cache_misses.by_reason() == {"tail": tail}
    assert sum(misses.values()) == queries - hits
    assert found["vllm:prompt_tokens_total"] == 4 * length
    cached, computed = (
        found[f"vllm:prompt_tokens_by_source_total {source}"]
        for source in ("local_cache_hit", "local_compute")
    )
    assert cached == found["vllm:prompt_tokens_cached_total"] == 2 * again.num_cached_tokens
    assert cached + computed == 4 * length
    assert found["vllm:generation_tokens_total"] == 8 + 8 + 8 + 1
    assert (
        found["vllm:inter_token_latency_seconds_count"] == 7 + 7 + 6
    )  # of each sequence, not of each request
    for name in (
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_inference_time_seconds",
    ):
        assert found[f"vllm:{name}_count"] == 4
        assert 0 <= found[f"vllm:{name}_sum"] < math.inf
    assert found["vllm:request_success_total length"] == 4
    assert found["vllm:iteration_tokens_total_sum"] == pytest.approx(
        queries - hits + found["vllm:generation_tokens_total"] - 5
    )


def test_blocks_that_made_room_are_missed_as_evicted() -> None:
    """Room for 8 blocks of 16 tokens: each prompt needs most of them."""
    params = SamplingParams(temperature=0, max_tokens=1)
    options = {"dtype": "bfloat16", "max_model_len": 128, "kv_cache_memory_bytes": 1 << 19}
    with LLM("demo", disable_log_stats=True, **options) as llm:
        for prompt in ([7] * 100, [8] * 100, [9] * 100):
            llm.generate(prompt, params, use_tqdm=False)
        before = llm.engine.core.stats().cache_misses
        (again,) = llm.generate([7] * 100, params, use_tqdm=False)
        after = llm.engine.core.stats().cache_misses
    assert before == CacheMisses(new=3 * 96, tail=3 * 4)
    assert again.cache_misses == CacheMisses(evicted=96, tail=4) and after == before + again.cache_misses


def test_a_reset_cache_has_nothing_that_was_there() -> None:
    params = SamplingParams(temperature=0, max_tokens=1)
    with LLM("demo", disable_log_stats=True) as llm:
        cached = []
        for reset in (False, False, True, False):
            if reset:
                assert llm.reset_prefix_cache()
            cached.append(llm.generate(PROMPT, params, use_tqdm=False)[0].num_cached_tokens)
    assert cached[0] == cached[2] == 0 and cached[1] == cached[3] > 0


def test_an_asynchronous_engine_resets_too() -> None:
    params = SamplingParams(temperature=0, max_tokens=1)

    async def main() -> list[int]:
        engine, cached = AsyncEngine(Config(model="demo", device="cpu", disable_log_stats=True)), []
        for reset in (False, False, True):
            if reset:
                assert await engine.reset_prefix_cache()
            cached += [output.num_cached_tokens async for output in engine.generate(PROMPT, params)]
        engine.shutdown()
        return cached

    first, second, third = asyncio.run(main())
    assert first == third == 0 and second > 0
