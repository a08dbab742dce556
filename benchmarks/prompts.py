"""How prompts and streams share steps whose time is limited: 64 requests, 32 at a time, on simulated devices.

A step takes so long, for itself, each newest token and each of a prompt. The first round begins with cold steps. The
scheduler is the real one; no network runs.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from quire.scheduler.blocks import BlockPool
from quire.scheduler.limits import Limits
from quire.scheduler.plan import Result
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.sequence import NewSequence

REQUESTS, STREAMS = 64, 32
INPUTS, OUTPUTS = (32, 256), (32, 128)
COLD_S = (2.0, 0.3, 0.3, 0.2, 0.2)  # that the first steps take longer
DEVICES = {  # seconds of a step, a newest token, a token of a prompt
    "Xeon with AMX": (0.07, 0.004, 0.0012),
    "the same, busy": (0.1, 0.0055, 0.0018),
    "EPYC with AVX-512": (0.028, 0.0039, 0.00245),
    "EPYC with AVX2": (0.06, 0.0075, 0.0064),
}
LIMITS = ((0.25, 0.0), (0.25, 2.0), (0.5, 0.0), (None, 0.0))  # max_gap_s, min_prefill_time


@dataclass
class Round:
    """What the clients of one round saw, in seconds."""

    sent: dict[int, float] = field(default_factory=dict)
    newest: dict[int, float] = field(default_factory=dict)
    firsts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def token(self, seq: int, now: float) -> None:
        if seq in self.newest:
            self.gaps.append(now - self.newest[seq])
        else:
            self.firsts.append(now - self.sent[seq])
        self.newest[seq] = now

    def row(self, seconds: float) -> str:
        rate = (len(self.firsts) + len(self.gaps)) / seconds
        firsts, gaps = sorted(self.firsts), sorted(self.gaps)
        late, slow = firsts[len(firsts) * 99 // 100], gaps[len(gaps) * 99 // 100] * 1e3
        return f"{rate:.1f} | {firsts[len(firsts) // 2]:.1f}, {late:.1f} | {slow:.0f}"


def serve(
    scheduler: Scheduler, step_s: Callable[[int, int], float], number: int, now: float
) -> tuple[Round, float]:
    """One round, from `now` on, and when it ended; a request comes whenever another one has ended."""
    chance, found, seqs = (
        random.Random(number),
        Round(),
        iter(range(number * REQUESTS, (number + 1) * REQUESTS)),
    )
    left: dict[int, int] = {}  # tokens of the open requests
    sizes = [(chance.randint(*INPUTS), chance.randint(*OUTPUTS)) for _ in range(REQUESTS)]
    alone = True  # the first request comes before the others
    while len(found.sent) < REQUESTS or left:
        while len(left) < (1 if alone else STREAMS) and (seq := next(seqs, None)) is not None:
            size, left[seq] = sizes[seq % REQUESTS]
            prompt = tuple(chance.randrange(9**9) for _ in range(size))
            scheduler.add(NewSequence(id=seq, prompt=prompt, max_tokens=left[seq]), now)
            found.sent[seq] = now
        alone = False
        plan = scheduler.schedule(now)
        now += step_s(scheduler.batched_tokens - scheduler.prefill_tokens, scheduler.prefill_tokens)
        scheduler.commit(plan, Result(tuple((7,) if w.samples else () for w in plan.work)), now)
        for work in plan.work:
            if work.samples:
                found.token(work.seq, now)
                left[work.seq] -= 1
                if not left[work.seq]:
                    del left[work.seq]
    return found, now


def main() -> None:
    print(
        "| device | limit, ms | times decoding | round | tok/s | first tokens, s: half, 99 % | 99 % of gaps, ms |"
    )
    print("|---|---|---|---|---|---|---|")
    for device, (step, newest, prompt) in DEVICES.items():
        for gap_s, times in LIMITS:
            pool, cold, now = BlockPool(4000, 16, secret=bytes(16)), list(COLD_S), 0.0
            limits = {"max_gap_s": gap_s, "min_prefill_time": times}
            scheduler = Scheduler(pool, Limits(max_batched_tokens=8192, max_seqs=256, **limits))

            def step_s(decodes: int, prefills: int) -> float:
                late = cold.pop(0) if cold else 0.0  # noqa: B023
                return step + newest * decodes + prompt * prefills + late  # noqa: B023

            for number in range(2):
                begun = now
                found, now = serve(scheduler, step_s, number, now)
                limit = "none" if gap_s is None else f"{gap_s * 1e3:.0f}"
                print(f"| {device} | {limit} | {times:g} | {number + 1} | {found.row(now - begun)} |")


if __name__ == "__main__":
    main()
