"""How busy an engine is, as the header that routers read. Knows no route."""

from dataclasses import dataclass, fields
from typing import Self

from prometheus_client.registry import Collector

from quire.engine.metrics import Metrics, added

HEADER = "x-engine-load"
GAUGES = {
    "queued_tokens": "quire:saturation_queued_tokens",
    "running": "vllm:num_requests_running",
    "kv_use": "vllm:kv_cache_usage_perc",
}
FACTS = "vllm:cache_config_info"


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine has to do.

    Attributes:
        queued_tokens: of prompts that take part in no step yet.
        running: sequences that take part in steps.
        kv_use: share of the KV cache that is in use, 0 to 1.
        kv_tokens: tokens that it holds in all; 0 if that is not known.
    """

    queued_tokens: int
    running: int
    kv_use: float
    kv_tokens: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{f.name}={getattr(self, f.name):g}" for f in fields(self))

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """What a header says; None if it is none of ours."""
        try:
            found = {
                name.strip(): float(value) for name, _, value in (p.partition("=") for p in text.split(","))
            }
            load = cls(
                int(found["queued_tokens"]),
                int(found["running"]),
                found["kv_use"],
                int(found.get("kv_tokens", 0)),
            )
        except (ValueError, KeyError, OverflowError):
            return None
        return load if min(load.queued_tokens, load.running, load.kv_tokens) >= 0 else None

    @classmethod
    def of(cls, metrics: Metrics) -> Self | None:
        """An engine's, if its steps are observed here; no number that another process has."""
        totals = added(each.totals for each in metrics.engines)
        if not totals.num_blocks:
            return None
        queued = int(metrics.steps.saturation["tokens"].value)
        tokens = sum(each.num_cache_tokens for each in metrics.engines)
        return cls(queued, totals.num_running, round(totals.used_blocks / totals.num_blocks, 4), tokens)

    @classmethod
    def collected(cls, collector: Collector) -> Self:
        """That of all engines whose metrics these are."""
        sums, tokens, num_engines = dict.fromkeys(GAUGES.values(), 0.0), 0, 0
        for metric in collector.collect():
            for sample in metric.samples:
                if sample.name in sums:
                    sums[sample.name] += sample.value
                elif sample.name == FACTS:
                    tokens += int(sample.labels["block_size"]) * int(sample.labels["num_gpu_blocks"])
                    num_engines += 1
        queued, running, use = (sums[name] for name in GAUGES.values())
        return cls(int(queued), int(running), round(use / max(num_engines, 1), 4), tokens)
