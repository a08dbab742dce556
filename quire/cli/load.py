"""When each request of a benchmark is due. Knows no clock, no network and no prompts."""

import math
import random
from dataclasses import dataclass

from quire.errors import ConfigError

RAMPS = ("linear", "exponential")


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests per second that arrive by chance, as a gamma process.

    Attributes:
        rate: mean requests per second; infinite: all at once.
        burstiness: shape of the gamma distribution of gaps. 1: a Poisson process; below: in bursts; above: more
            evenly; infinite: with equal gaps.
        ramp: how the rate goes from `start` to `end` over the requests, instead of `rate`.
    """

    rate: float = math.inf
    burstiness: float = 1.0
    ramp: str | None = None
    start: float = 0.0
    end: float = 0.0

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ConfigError(f"request_rate is {self.rate}; it must be above 0, or inf for all at once")
        if not self.burstiness > 0:
            raise ConfigError(f"burstiness is {self.burstiness}; it must be above 0")
        if self.ramp is None:
            return
        if self.ramp not in RAMPS:
            raise ConfigError(f"ramp_up_strategy is {self.ramp!r}; it must be one of {', '.join(RAMPS)}")
        if math.isfinite(self.rate):
            raise ConfigError(
                "request_rate cannot be given with ramp_up_strategy, which has rates of its own; leave one out"
            )
        for name, value in (("ramp_up_start_rps", self.start), ("ramp_up_end_rps", self.end)):
            if not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}; it must be above 0 and finite")

    def rate_at(self, share: float) -> float:
        """Requests per second after this share of the requests, from 0 to 1."""
        if self.ramp == "linear":
            return self.start + (self.end - self.start) * share
        if self.ramp == "exponential":
            return self.start * float((self.end / self.start) ** share)
        return self.rate

    def arrivals(self, num_requests: int, chance: random.Random) -> list[float]:
        """Seconds after the beginning, ascending. At a fixed rate the last is at `num_requests / rate`, so that
        runs of different seeds offer the same load.
        """
        times: list[float] = []
        now = 0.0
        for i in range(num_requests):
            gap = 1 / self.rate_at(i / max(1, num_requests - 1))
            if gap and math.isfinite(self.burstiness):
                gap *= chance.gammavariate(self.burstiness, 1 / self.burstiness)
            now += gap
            times.append(now)
        if self.ramp is None and now:
            scale = num_requests / self.rate / now
            times = [time * scale for time in times]
        return times
