"""What the scheduler costs the CPU: milliseconds for `schedule` and `commit` with 256 decoding sequences."""

import statistics
from time import thread_time

from quire.scheduler.blocks import BlockPool
from quire.scheduler.limits import Limits
from quire.scheduler.plan import Result
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.sequence import NewSequence

NUM_SEQUENCES, PROMPT_LEN, OUTPUT_LEN, NUM_STEPS = 256, 1000, 1200, 500


def measure(block_size: int, drafts: int) -> list[float]:
    """Milliseconds of each step once every sequence decodes; a third of the sequences accepts no drafts."""
    num_blocks = NUM_SEQUENCES * (PROMPT_LEN + OUTPUT_LEN + block_size) // block_size + NUM_SEQUENCES
    pool = BlockPool(num_blocks, block_size, secret=bytes(16))
    scheduler = Scheduler(pool, Limits(max_batched_tokens=8192, max_seqs=NUM_SEQUENCES, drafts=drafts))
    for i in range(NUM_SEQUENCES):
        prompt = tuple(range(3 * i, 3 * i + PROMPT_LEN))
        scheduler.add(NewSequence(id=i, prompt=prompt, max_tokens=OUTPUT_LEN, tenant=str(i % 4)), 0.0)
    times: list[float] = []
    now, prefilling = 0.0, True
    while len(times) < NUM_STEPS // (drafts + 1):
        start = thread_time()
        plan = scheduler.schedule(now)
        middle = thread_time()
        tokens = tuple((7,) * (1 if w.seq % 3 == 0 else w.drafts + 1) if w.samples else () for w in plan.work)
        now += 0.01
        resume = thread_time()
        scheduler.commit(plan, Result(tokens), now)
        if not prefilling:
            times.append((middle - start + thread_time() - resume) * 1e3)
        prefilling = scheduler.num_waiting > 0 or len(plan.work) < NUM_SEQUENCES
    return times


def main() -> None:
    for block_size, drafts in ((16, 0), (64, 0), (16, 3)):
        times = sorted(measure(block_size, drafts))
        p99 = times[int(len(times) * 0.99)]
        print(
            f"blocks of {block_size}, {drafts} drafts: mean {statistics.mean(times):.3f} ms, p99 {p99:.3f} ms"
        )


if __name__ == "__main__":
    main()
