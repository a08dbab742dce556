"""Drafts use what a step has to spare: they never cost another sequence its place."""

from tests.scheduler.workload import Case, Machine, Run, run

FOREVER = frozenset[int]()


def decoders(num: int, max_tokens: int = 30) -> list[Case]:
    return [Case((i, 1, 2), max_tokens, 0, stops=FOREVER) for i in range(num)]


def test_accepted_drafts_save_steps() -> None:
    plain = run(decoders(2), Machine())
    drafted = run(decoders(2), Machine(drafts=3))
    assert len(drafted.device.plans) < 0.7 * len(plain.device.plans)


def test_drafts_share_the_step() -> None:
    """Six positions for four sequences leave two for drafts."""
    done = run(decoders(4), Machine(drafts=3, max_seqs=4, spare_tokens=2))
    steady = [plan.work for plan in done.device.plans if len(plan.work) == 4][1:]
    assert steady and {sum(w.drafts for w in work) for work in steady} <= {0, 1, 2}
    assert max(sum(w.drafts for w in work) for work in steady) == 2


def test_drafts_leave_half_of_what_is_spare_to_a_prefill() -> None:
    todo = [*decoders(3), Case(tuple(range(60)), 2, 3, stops=FOREVER)]
    done = run(todo, Machine(drafts=3, max_seqs=4, spare_tokens=8))
    chunks = [w.count for plan in done.device.plans for w in plan.work if w.seq == 3 and not w.samples]
    assert len(chunks) > 3 and min(chunks) >= 12 - 3 - 4


def test_nobody_is_preempted_for_a_guess() -> None:
    """Near the end the first could draft into a fifth block, which the second needs until it ends."""
    todo = [Case((0, 1, 2, 3), 9, 0, stops=FOREVER), Case((1, 1, 2, 3), 4, 0, stops=FOREVER)]
    done = Run(todo, Machine(drafts=3, num_blocks=4, block_size=4, good_drafts=False))
    most = max(done.pool.num_used for _ in done.steps())
    assert most == 4 and not done.scheduler.num_preemptions
