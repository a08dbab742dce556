"""Plan, launch, and only then look at what earlier steps said, so no device idles. Knows no requests."""

from collections import deque
from collections.abc import Callable
from typing import Protocol

from quire.errors import ConfigError
from quire.scheduler.plan import Emitted, Plan, Result


class Planner(Protocol):
    """A scheduler, or one that is being recorded."""

    @property
    def idle(self) -> bool:
        """Nothing is left to plan."""

    def schedule(self, now: float) -> Plan:
        """The next step."""

    def commit(self, plan: Plan, result: Result, now: float) -> list[Emitted]:
        """Learn what a step sampled."""


class Device(Protocol):
    """Carries out plans in order."""

    def launch(self, plan: Plan) -> object:
        """Apply a plan's changes and start its forward pass. A plan without work brings only changes."""

    def sample(self, plan: Plan) -> Callable[[], Result]:
        """Start sampling for the plan launched last; the returned call waits for the tokens."""


class Loop:
    """One step at a time, with at most `depth - 1` plans in flight between steps; depth 1 is synchronous.

    Up to depth 2 a plan samples when all earlier tokens are known, on which what is allowed may depend.
    """

    def __init__(
        self,
        scheduler: Planner,
        device: Device,
        *,
        depth: int,
        now: Callable[[], float],
    ):
        if depth < 1:
            raise ConfigError(f"depth is {depth}; it must be at least 1, which is synchronous")
        self.scheduler, self.device, self.depth, self.now = scheduler, device, depth, now
        self.inflight: deque[tuple[Plan, Callable[[], Result]]] = deque()
        self.launched: Plan | None = None  # and not sampled yet

    @property
    def idle(self) -> bool:
        """Nothing is left to plan or to wait for."""
        return not self.inflight and self.launched is None and self.scheduler.idle

    def step(self) -> list[Emitted]:
        """Compute one step, or wait for one if there is nothing to compute; return what the host learned.

        What was interrupted while it waited is gone on with.
        """
        if self.launched is None:
            plan = self.scheduler.schedule(self.now())
            if plan.work or plan.ends:
                self.device.launch(plan)
            if not plan.work:
                return self._settle(len(self.inflight) - 1)
            self.launched = plan
        emitted = self._settle(max(self.depth - 2, 0))  # while the device computes
        sampled = self.device.sample(self.launched)
        self.inflight.append((self.launched, sampled))
        self.launched = None
        return emitted + self._settle(self.depth - 1)

    def _settle(self, keep: int) -> list[Emitted]:
        emitted: list[Emitted] = []
        while len(self.inflight) > max(keep, 0):
            plan, result = self.inflight[0]
            outcome = result()  # before it is out of flight: that may be interrupted
            self.inflight.popleft()
            emitted += self.scheduler.commit(plan, outcome, self.now())
        return emitted
