"""Which replica should compute a request? Simulated replicas with prefix caches, policies side by side.

`python -m benchmarks.routing` simulates; it takes no replica and half a minute.
"""

import heapq
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from quire.engine.router import Router, Ticket

BLOCK_TOKENS = 64
PREFILL_TOKENS_S, STEP_S, SEQUENCE_S = 12_000.0, 0.012, 0.0004  # of a replica
CACHE_BLOCKS, STEP_TOKENS = 2_200, 2_048
LENGTH_S = 120.0
Block = tuple[object, ...]


@dataclass(slots=True)
class Job:
    """A turn of a conversation."""

    arrival_s: float
    session: str
    chain: list[Block]
    num_outputs: int
    left_tokens: int = 0  # to prefill
    left_outputs: int = 0
    ticket: Ticket | None = None


@dataclass(slots=True)
class Replica:
    """A simulated engine: chunks of prefill and everybody's next token, in turns."""

    slowness: float
    cache: OrderedDict[Block, None] = field(default_factory=OrderedDict)
    queue: deque[Job] = field(default_factory=deque)
    running: list[Job] = field(default_factory=list)
    busy: bool = False

    @property
    def num_open(self) -> int:
        return len(self.queue) + len(self.running)

    def num_hits(self, chain: Sequence[Block]) -> int:
        hits = 0
        for block in chain:
            if block not in self.cache:
                break
            self.cache.move_to_end(block)
            hits += 1
        return min(hits, len(chain) - 1)

    def keep(self, chain: Sequence[Block]) -> None:
        for block in reversed(chain):
            self.cache[block] = None
            self.cache.move_to_end(block)
        while len(self.cache) > CACHE_BLOCKS:
            self.cache.popitem(last=False)


def workload(sessions_per_s: float, seed: int = 1) -> list[Job]:
    """Conversations of 1 to 8 turns over six system prompts of very different fame."""
    rnd = random.Random(seed)
    systems = [[("system", i, k) for k in range(rnd.choice([8, 24, 60]))] for i in range(6)]
    jobs, now, number = [], 0.0, 0
    while now < LENGTH_S:
        now += rnd.expovariate(sessions_per_s)
        number += 1
        chain: list[Block] = list(rnd.choices(systems, [0.45, 0.2, 0.15, 0.1, 0.06, 0.04])[0])
        at = now
        for turn in range(rnd.choice([1, 1, 2, 4, 8])):
            chain = chain + [
                ("user", number, turn, k) for k in range(max(1, int(rnd.lognormvariate(1.2, 0.9))))
            ]
            outputs = max(8, int(rnd.lognormvariate(4.6, 0.7)))
            jobs.append(Job(at, str(number), chain, outputs))
            chain = chain + [("answer", number, turn, k) for k in range(outputs // BLOCK_TOKENS)]
            at += rnd.expovariate(1 / 8) + outputs * 0.02
    return sorted(jobs, key=lambda job: job.arrival_s)


Choose = Callable[[list[Replica], Job, float], int]


def policies(num_replicas: int) -> Iterator[tuple[str, Choose, Router | None]]:
    rnd, turns = random.Random(0), iter(range(10**9))
    everybody = range(num_replicas)

    def least(replicas: list[Replica], job: Job, now: float) -> int:
        return min(everybody, key=lambda i: (replicas[i].num_open, rnd.random()))

    def two(replicas: list[Replica], job: Job, now: float) -> int:
        return min(rnd.sample(everybody, 2), key=lambda i: replicas[i].num_open)

    yield "round robin", lambda replicas, job, now: next(turns) % num_replicas, None
    yield "least requests", least, None
    yield "power of two", two, None
    for name, share in (
        ("cost", 1.0),
        ("cost, index half as large", 0.5),
        ("cost, index twice as large", 2.0),
    ):
        router = Router(
            [f"replica-{i}" for i in everybody],
            piece_tokens=BLOCK_TOKENS,
            capacity=int(CACHE_BLOCKS * share),
            most_s=1e9,
        )

        def cost(replicas: list[Replica], job: Job, now: float, router: Router = router) -> int:
            num_tokens = len(job.chain) * BLOCK_TOKENS
            job.ticket = router.route(job.chain, num_tokens, now, session=job.session)
            return job.ticket.replica

        yield name, cost, router


@dataclass(slots=True)
class Outcome:
    """What a policy brought."""

    num_blocks: int = 0
    num_hits: int = 0
    first_s: list[float] = field(default_factory=list)

    def at(self, share: float) -> float:
        return sorted(self.first_s)[int(share * len(self.first_s))]

    def __str__(self) -> str:
        mean = sum(self.first_s) / len(self.first_s)
        times = (mean, self.at(0.5), self.at(0.95), self.at(0.99))
        return f"{self.num_hits / self.num_blocks:6.1%} " + " ".join(f"{1000 * t:8.0f}" for t in times)


class Simulation:
    """Runs jobs over replicas by one policy."""

    def __init__(self, slownesses: Sequence[float], choose: Choose, router: Router | None):
        self.replicas = [Replica(slowness) for slowness in slownesses]
        self.choose, self.router, self.outcome = choose, router, Outcome()
        self.events: list[tuple[float, int, Callable[[float], None]]] = []
        self.numbers = iter(range(10**9))

    def run(self, jobs: Sequence[Job]) -> Outcome:
        for job in jobs:
            self._at(job.arrival_s, lambda now, job=job: self._arrive(job, now))  # type: ignore[misc]
        while self.events:
            now, _, act = heapq.heappop(self.events)
            act(now)
        return self.outcome

    def _at(self, now: float, act: Callable[[float], None]) -> None:
        heapq.heappush(self.events, (now, next(self.numbers), act))

    def _arrive(self, job: Job, now: float) -> None:
        replica = self.replicas[self.choose(self.replicas, job, now)]
        hits = replica.num_hits(job.chain)
        self.outcome.num_hits += hits
        self.outcome.num_blocks += len(job.chain)
        job.left_tokens, job.left_outputs = (len(job.chain) - hits) * BLOCK_TOKENS, job.num_outputs
        replica.queue.append(job)
        if not replica.busy:
            self._step(replica, now)

    def _step(self, replica: Replica, now: float) -> None:
        replica.busy = bool(replica.num_open)
        if not replica.busy:
            return
        took_s, budget = STEP_S + SEQUENCE_S * len(replica.running), STEP_TOKENS
        begun: list[Job] = []
        while replica.queue and budget:
            job = replica.queue[0]
            part = min(budget, job.left_tokens)
            job.left_tokens -= part
            budget -= part
            took_s += part / PREFILL_TOKENS_S
            if not job.left_tokens:
                begun.append(replica.queue.popleft())
        self._at(now + took_s * replica.slowness, lambda now: self._commit(replica, begun, now))

    def _commit(self, replica: Replica, begun: list[Job], now: float) -> None:
        for job in begun:
            self.outcome.first_s.append(now - job.arrival_s)
            replica.keep(job.chain)
            replica.running.append(job)
            if self.router is not None and job.ticket is not None:
                self.router.began(job.ticket, now)
        for job in replica.running:
            job.left_outputs -= 1
            if not job.left_outputs and self.router is not None and job.ticket is not None:
                self.router.ended(job.ticket)
        replica.running = [job for job in replica.running if job.left_outputs]
        self._step(replica, now)


def main() -> None:
    lines = ["policy                       hits     mean      p50      p95      p99   (ms to first token)"]
    for rate, slownesses in ((4.0, (1, 1, 1, 1)), (7.0, (1, 1, 1, 1)), (7.0, (1, 1, 1, 2))):
        jobs = workload(rate)
        lines.append(f"{rate:g} sessions/s, {len(jobs)} requests, replicas {slownesses} times as slow")
        for name, choose, router in policies(len(slownesses)):
            outcome = Simulation(slownesses, choose, router).run(workload(rate))
            lines.append(f"  {name:26s} {outcome}")
    print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    main()
