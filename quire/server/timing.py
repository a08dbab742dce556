"""How long a call took, part by part. Knows no route and writes no body.

arrival ── queue ── first step ── prefill ── first token ── decode ── last token ── end
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from quire.types import Request, RequestOutput


@dataclass(slots=True)
class Timing:
    """The requests of one call, and the latest output of each; whoever reads outputs notes them here.

    Of several prompts the parts are those of all together: until the first was begun, until the first token, until the
    last one. Times are on the engine's clock.
    """

    requests: list[Request] = field(default_factory=list)
    latest: dict[int, RequestOutput] = field(default_factory=dict)  # by the prompt's number

    def header(self) -> dict[str, str]:
        """What is known by now, as the header Server-Timing: milliseconds."""
        parts = [f"{name};dur={seconds * 1000:.1f}" for name, seconds in self._parts()]
        return {"Server-Timing": ", ".join(parts)}

    def body(self) -> dict[str, Any]:
        """What a request with `return_timing` reads."""
        metrics = [output.metrics for output in self.latest.values()]
        parts = dict(self._parts())
        num_generated = sum(m.num_generated_tokens for m in metrics)
        computing_s = parts.get("prefill", 0.0) + parts.get("decode", 0.0)
        return {
            **{f"{name}_s": round(seconds, 6) for name, seconds in parts.items()},
            "tokens_per_second": round(num_generated / computing_s, 3) if computing_s else None,
            "cached_tokens": sum(output.num_cached_tokens for output in self.latest.values()),
            "num_preemptions": sum(m.num_preemptions for m in metrics),
            "num_replays": sum(m.num_replays for m in metrics),
        }

    def _parts(self) -> Iterator[tuple[str, float]]:
        """Names and seconds of the parts that are over, and of all so far."""
        metrics = [output.metrics for output in self.latest.values()]
        arrival = min((request.arrival_s for request in self.requests), default=0.0)
        seated = min((m.scheduled_s for m in metrics if m.scheduled_s is not None), default=None)
        first = min((m.first_token_s for m in metrics if m.first_token_s is not None), default=None)
        if seated is not None:
            yield "queue", seated - arrival
        if seated is not None and first is not None:
            yield "prefill", first - seated
        if first is not None and all(output.finished for output in self.latest.values()):
            yield "decode", max(m.last_token_s for m in metrics if m.last_token_s is not None) - first
        yield "total", time.monotonic() - arrival
