"""Who runs, who waits, and who has to make way."""

from collections import Counter

import pytest

from quire.scheduler.policy import Queue, Tenants
from tests.scheduler.workload import Case, Machine, Run, run

FOREVER = frozenset[int]()


def case(number: int, length: int = 8, max_tokens: int = 12, arrival: int = 0, **more: object) -> Case:
    """A request whose prompt begins like no other."""
    prompt = (number, *range(1, length))
    return Case(prompt, max_tokens, arrival, stops=FOREVER, **more)  # type: ignore[arg-type]


def first_steps(done: Run) -> dict[int, int]:
    """Sequence -> the step that first computed something of it."""
    first: dict[int, int] = {}
    for plan in done.device.plans:
        for w in plan.work:
            first.setdefault(w.seq, plan.step)
    return first


def order(done: Run) -> list[int]:
    first = first_steps(done)
    return sorted(first, key=lambda seq: (first[seq], seq))


def finish_steps(done: Run) -> dict[int, int]:
    return {w.seq: plan.step for plan in done.device.plans for w in plan.work}


def test_first_come_first_served() -> None:
    done = run([case(i) for i in range(8)], Machine(max_seqs=2))
    assert order(done) == list(range(8))


def test_higher_priority_is_seated_first() -> None:
    priorities = (3, 1, 2, 0, 1)
    done = run([case(i, priority=p) for i, p in enumerate(priorities)], Machine(max_seqs=1))
    assert order(done) == [3, 1, 4, 2, 0]
    assert not done.scheduler.num_preemptions


@pytest.mark.parametrize("depth", [1, 3])
def test_higher_priority_takes_the_seat_of_the_lowest_and_latest(depth: int) -> None:
    todo = [
        case(0, priority=1),
        case(1, priority=2),
        case(2, priority=2, arrival=1),
        case(3, priority=1, arrival=2),
        case(4, max_tokens=3, priority=0, arrival=6),
    ]
    done = run(todo, Machine(max_seqs=4, depth=depth))
    assert [done.stats[i].num_preemptions for i in range(5)] == [0, 0, 1, 0, 0]
    assert first_steps(done)[4] == 7, "at once"


def test_equal_priority_takes_no_seat() -> None:
    done = run([case(0), case(1), case(2, arrival=3)], Machine(max_seqs=2))
    assert not done.scheduler.num_preemptions


def test_higher_priority_takes_as_many_blocks_as_it_lacks() -> None:
    machine = Machine(num_blocks=20, block_size=4)  # three times 4, and one of headroom each
    todo = [case(i, length=16, max_tokens=2, priority=1) for i in range(3)]
    done = run([*todo, case(3, length=44, max_tokens=2, arrival=1)], machine)
    assert [done.stats[i].num_preemptions for i in range(4)] == [0, 1, 1, 0]
    assert first_steps(done)[3] == 2, "at once"


def test_nobody_is_preempted_in_vain() -> None:
    """The blocks that the urgent one lacks belong to its equals, so the lower priority goes on."""
    machine = Machine(num_blocks=20, block_size=4)
    todo = [case(0, length=40, max_tokens=6), case(1, length=12, max_tokens=6, priority=1)]
    done = run([*todo, case(2, length=48, max_tokens=2, arrival=1)], machine)
    assert not done.scheduler.num_preemptions
    assert first_steps(done)[2] > finish_steps(done)[0]


def test_the_lowest_and_latest_makes_way_when_blocks_run_out() -> None:
    machine = Machine(num_blocks=9, block_size=4)
    todo = [case(0, length=7, max_tokens=16), case(1, length=7, max_tokens=16, arrival=1)]
    done = run(todo, machine)
    assert done.stats[0].num_preemptions == 0 and done.stats[1].num_preemptions > 0
    swapped = run([todo[0], case(1, length=7, max_tokens=16, arrival=1, priority=-1)], machine)
    assert swapped.stats[0].num_preemptions > 0 and swapped.stats[1].num_preemptions == 0


def test_admission_leaves_a_block_for_each_that_runs() -> None:
    """Four that run need a block each at the next step; a fifth one is seated if it leaves them."""
    todo = [case(i, length=8, max_tokens=4) for i in range(4)]
    for num_blocks, together in ((13, False), (14, True)):
        machine = Machine(num_blocks=num_blocks, max_seqs=5, block_size=4)
        done = run([*todo, case(4, length=8, max_tokens=4)], machine)
        assert (first_steps(done)[4] == first_steps(done)[0]) == together


def test_a_lone_sequence_starts_whatever_is_left() -> None:
    done = run([case(0, length=31, max_tokens=2)], Machine(num_blocks=8, block_size=4))
    assert first_steps(done)[0] == 1


def test_a_large_one_is_not_passed_by_those_behind_it() -> None:
    machine = Machine(num_blocks=12, block_size=4, max_seqs=3)
    todo = [case(0, length=24, max_tokens=9), case(1, length=32, max_tokens=2, arrival=1)]
    done = run([*todo, *(case(i, length=4, max_tokens=2, arrival=2) for i in range(2, 6))], machine)
    assert order(done)[:2] == [0, 1]


def served(done: Run, tenant_of: dict[int, str]) -> list[Counter[str]]:
    """Positions computed for each tenant up to each step."""
    total: Counter[str] = Counter()
    history = []
    for plan in done.device.plans:
        for w in plan.work:
            total[tenant_of[w.seq]] += w.count
        history.append(total.copy())
    return history


def test_a_flood_of_one_tenant_does_not_hold_up_another() -> None:
    flood = [case(i, length=12, max_tokens=8, tenant="flood") for i in range(60)]
    other = [case(100 + i, length=12, max_tokens=8, tenant="other", arrival=10) for i in range(20)]
    done = run([*flood, *other], Machine(num_blocks=200))
    tenant_of = {i: c.tenant for i, c in enumerate([*flood, *other])}
    history = served(done, tenant_of)
    begin = history[10]
    last = max(step for seq, step in finish_steps(done).items() if tenant_of[seq] == "other")
    bound = 2 * 4 * (12 + 8)  # twice what the seats can hold
    for now in history[10 : last - 1]:
        gain = {name: now[name] - begin[name] for name in ("flood", "other")}
        assert abs(gain["flood"] - gain["other"]) <= bound
    assert history[last - 1]["flood"] - begin["flood"] < 2 * 20 * (12 + 8)


def test_seats_that_are_free_at_once_go_to_tenants_in_turn() -> None:
    todo = [case(i, tenant="a") for i in range(4)] + [case(4 + i, tenant="b") for i in range(4)]
    done = run(todo, Machine(max_seqs=4))
    first = first_steps(done)
    assert sorted(seq for seq in first if first[seq] == 1) == [0, 1, 4, 5]


@pytest.mark.parametrize("shares", [(3.0, 1.0), (1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("max_seqs", [4, 7])
def test_tenants_that_want_all_get_their_shares(shares: tuple[float, float], max_seqs: int) -> None:
    todo = [case(i, max_tokens=6, tenant="ab"[i % 2], share=shares[i % 2]) for i in range(200)]
    done = run(todo, Machine(max_seqs=max_seqs, num_blocks=400))
    tenant_of = {i: c.tenant for i, c in enumerate(todo)}
    last = {t: max(s for q, s in finish_steps(done).items() if tenant_of[q] == t) for t in "ab"}
    both = served(done, tenant_of)[min(last.values()) - 20]  # while either had more than its seats could hold
    assert min(both.values()) > 200
    assert both["a"] / both["b"] == pytest.approx(shares[0] / shares[1], rel=0.1)


def test_priority_comes_before_shares() -> None:
    todo = [case(i, tenant="small", share=0.01, arrival=1) for i in range(4)]
    todo += [case(4 + i, tenant="large", share=100.0, priority=1) for i in range(8)]
    done = run(todo, Machine(max_seqs=1))
    assert order(done)[1:5] == [0, 1, 2, 3], "all but the one that ran before they came"


def test_a_share_holds_from_the_latest_request_on() -> None:
    tenants = Tenants()
    assert tenants.join("a", 4.0).price == 0.25 and tenants.join("a", 2.0).price == 0.5


def test_a_tenant_that_comes_back_starts_with_those_that_stayed() -> None:
    tenants = Tenants()
    stayed, gone = tenants.join("stayed"), tenants.join("gone")
    assert stayed.served == gone.served == 0
    stayed.served, gone.served = 1000, 10
    tenants.leave(gone)
    assert tenants.join("gone").served == 1000, "being away saves nothing up"
    assert tenants.join("new").served == 1000


def test_a_tenant_that_is_ahead_stays_ahead() -> None:
    tenants = Tenants()
    behind, ahead = tenants.join("behind"), tenants.join("ahead")
    behind.served, ahead.served = 100, 900
    tenants.leave(ahead)
    assert tenants.join("ahead").served == 900, "leaving for a moment forgives nothing"


def test_absent_tenants_are_forgotten() -> None:
    tenants = Tenants()
    for i in range(100):
        tenants.leave(tenants.join(f"visitor {i}"))
    stays = tenants.join("stays")
    assert set(tenants._by_name) == {"stays"} and stays.served == 0


def test_preempted_work_that_never_ran_is_not_charged() -> None:
    machine = Machine(max_seqs=1, spare_tokens=3)
    todo = [
        case(0, length=20, max_tokens=2, priority=1, tenant="a"),
        case(1, length=4, max_tokens=2, arrival=1),
    ]
    done = Run(todo, machine)
    for step in done.steps():
        if step == 2:
            tenant = done.scheduler.seqs[0].tenant
            assert tenant.served == 4, "one chunk of prefill ran"
    assert done.stats[0].num_preemptions == 1


def test_an_empty_queue_has_no_first() -> None:
    assert Queue().first() is None


def test_priority_takes_a_seat_though_decodes_fill_the_step() -> None:
    todo = [case(i, length=2, priority=1) for i in range(2)]
    done = run([*todo, case(2, length=2, arrival=4)], Machine(max_seqs=2, spare_tokens=0))
    assert done.stats[1].num_preemptions == 1 and first_steps(done)[2] == 5


def test_sequences_are_seated_when_they_can_run_and_not_before() -> None:
    done = Run([case(i, length=40, max_tokens=2) for i in range(4)], Machine(max_seqs=4, spare_tokens=60))
    running = [done.scheduler.num_running for _ in done.steps()]
    assert running[0] == 2, "64 positions are one and a half of them"


def test_tenants_pay_for_outputs() -> None:
    long = [case(i, length=4, max_tokens=40, tenant="long") for i in range(3)]
    short = [case(10 + i, length=4, max_tokens=4, tenant="short") for i in range(8)]
    done = run([*long, *short], Machine(max_seqs=1))
    assert order(done)[:8] == [0, 3, 4, 5, 6, 7, 8, 9], "43 positions against 7 each"


def test_shared_blocks_are_not_gained_by_preempting() -> None:
    """The lower priority holds four blocks, but three of them the urgent one needs as they are."""
    prompt = tuple(range(1, 14))
    todo = [
        case(0, length=21, max_tokens=3),
        Case(prompt, 3, 0, priority=1, stops=FOREVER),
        Case((*prompt[:12], *range(20, 29)), 3, 1, stops=FOREVER),
    ]
    done = run(todo, Machine(num_blocks=12, block_size=4))
    assert done.stats[2].num_cached_tokens == 12
    assert not done.scheduler.num_preemptions


def test_the_latest_makes_way_even_if_it_prefills() -> None:
    todo = [case(0, length=4, max_tokens=9), case(1, length=24, max_tokens=2, arrival=1)]
    done = run(todo, Machine(num_blocks=8, block_size=4, max_seqs=2, spare_tokens=1))
    assert [s.num_preemptions for s in done.stats.values()] == [0, 1]
