"""The step loop: what is in flight, what is known when, and when it is idle."""

from collections.abc import Callable

import pytest

from quire.errors import ConfigError
from quire.scheduler.plan import Emitted, Plan, Result
from tests.scheduler.device import EOS
from tests.scheduler.workload import Case, Machine, Run, run

FOREVER = frozenset[int]()


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_depth_plans_are_in_flight_at_most(depth: int) -> None:
    done = Run([Case((1, 2), 20, 0, stops=FOREVER)], Machine(depth=depth))
    assert max(len(done.loop.inflight) for _ in done.steps()) == depth - 1


@pytest.mark.parametrize(("depth", "late"), [(1, 0), (2, 0), (3, 1), (4, 2)])
def test_steps_are_sampled_when_earlier_tokens_are_known(depth: int, late: int) -> None:
    """Up to depth 2 all earlier plans are committed by then; beyond, so many are not."""
    done = Run([Case((1, 2), 20, 0, stops=FOREVER)], Machine(depth=depth))
    sample, unknown = done.device.sample, list[int]()

    def sampled(plan: Plan) -> Callable[[], Result]:
        unknown.append(plan.step - 1 - done.device.num_committed)
        return sample(plan)

    done.device.sample = sampled  # type: ignore[method-assign]
    for _ in done.steps():
        pass
    assert max(unknown) == late


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_stages_compute_different_sequences_at_the_same_time(stages: int) -> None:
    """All are computed, a part of them in each plan, and the token of nobody that is planned is still on its way."""
    count = 12
    todo = [Case((i, 1), 30, 0, stops=FOREVER) for i in range(count)]
    done = Run(todo, Machine(max_seqs=count, num_blocks=200, stages=stages, depth=stages))
    shares = set()
    for step in done.steps():
        computing = [w.seq for plan, _ in done.loop.inflight for w in plan.work]
        assert len(computing) == len(set(computing))
        if 2 * stages < step < 20 * stages:
            assert len(done.loop.inflight) == stages - 1
            shares.add(len(done.device.plans[-1].work))
    assert shares == {count // stages}


@pytest.mark.parametrize("stages", [2, 3])
def test_pieces_of_one_prompt_are_at_all_stages(stages: int) -> None:
    machine = Machine(max_seqs=1, spare_tokens=3, stages=stages, depth=stages)
    done = Run([Case(tuple(range(24)), 2, 0, stops=FOREVER)], machine)
    in_flight = [len(done.loop.inflight) for _ in done.steps()]
    assert in_flight[1:6] == [min(i, stages - 1) for i in range(2, 7)]


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_an_end_wastes_at_most_the_rows_in_flight_and_a_known_end_none(depth: int) -> None:
    stopped = run([Case((i, 1), 30, 0, stops=frozenset({EOS})) for i in range(20)], Machine(depth=depth))
    by_stop = [i for i, got in stopped.got.items() if got[-1].finish == "stop"]
    assert len(by_stop) > 10
    assert max(stopped.device.ended[i] for i in by_stop) == depth - 1
    counted = run([Case((i, 1), 9, 0, stops=FOREVER) for i in range(20)], Machine(depth=depth))
    assert not any(counted.device.ended.values())


def test_the_device_hears_of_every_end_before_the_loop_is_idle() -> None:
    done = Run([Case((1, 2), 2, 0, stops=FOREVER)], Machine())
    for step in done.steps():
        if step == 2:
            assert not done.scheduler.seqs and not done.loop.idle
    last = done.device.plans[-1]
    assert not last.work and last.ends == (0,) and done.loop.idle
    assert done.loop.step() == [] and done.device.plans[-1] is last, "idle steps launch nothing"


def test_a_slot_is_used_again_in_the_plan_that_ends_it() -> None:
    done = run([Case((i, 2), 3, 0, stops=FOREVER) for i in range(2)], Machine(max_seqs=1))
    assert any(plan.ends == (0,) and [s.slot for s in plan.starts] == [0] for plan in done.device.plans)


def test_plans_bring_only_what_changed() -> None:
    done = run([Case((1, 2, 3, 4, 5), 8, 0, stops=FOREVER)], Machine(block_size=4))
    plans = done.device.plans
    assert [len(plan.starts) for plan in plans] == [1] + [0] * 8
    assert [len(w.new_blocks) for plan in plans for w in plan.work] == [2, 0, 0, 0, 1, 0, 0, 0]


def test_an_abort_in_flight_frees_blocks_at_once() -> None:
    done = Run([Case((1, 2, 3), 9, 0, stops=FOREVER, abort_after=3)], Machine(depth=4))
    used = [done.pool.num_used for _ in done.steps()]
    assert used[2] > 0 and not any(used[3:])


@pytest.mark.parametrize(("depth", "stages"), [(1, 1), (2, 1), (3, 1), (2, 2), (3, 3)])
def test_a_step_that_was_interrupted_while_it_waited_is_gone_on_with(depth: int, stages: int) -> None:
    todo = [Case((i, 1), 9, 0, stops=FOREVER) for i in range(4)]
    done = Run(todo, Machine(depth=depth, stages=stages))
    sample, step, interrupted = done.device.sample, done.loop.step, set[int]()

    def sampled(plan: Plan) -> Callable[[], Result]:
        wait = sample(plan)

        def result() -> Result:
            if plan.step % 3 == 0 and plan.step not in interrupted:
                interrupted.add(plan.step)
                raise KeyboardInterrupt
            return wait()

        return result

    def again() -> list[Emitted]:
        try:
            return step()
        except KeyboardInterrupt:
            assert not done.loop.idle
            return step()

    done.device.sample, done.loop.step = sampled, again  # type: ignore[method-assign]
    for _ in done.steps():
        pass
    assert len(interrupted) > 2


def test_depth_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="depth is 0"):
        Run([], Machine(depth=0))
