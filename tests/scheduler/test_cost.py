"""Step times: learned, predicted, turned into a size; and what the scheduler does with them."""

import pytest

from quire.scheduler.cost import StepCost
from tests.scheduler.workload import Case, Machine, Run


def learned(*steps: tuple[int, float]) -> StepCost:
    """After steps of (tokens, seconds), one after the other."""
    cost, now = StepCost(), 0.0
    for step, (tokens, seconds) in enumerate(steps):
        cost.begin(step, tokens, now)
        now += seconds
        cost.end(step, now)
    return cost


def affine(tokens: int) -> tuple[int, float]:
    return tokens, 0.01 + 0.001 * tokens


def test_nothing_is_predicted_before_the_first_step() -> None:
    assert StepCost().predict(10) is None and StepCost().most_tokens(1.0) is None


def test_lines_join_what_was_measured() -> None:
    cost = learned(affine(4), affine(60), affine(300))
    for tokens in (4, 10, 60, 100, 299, 300):
        assert cost.predict(tokens) == pytest.approx(affine(tokens)[1])
    assert cost.predict(1) == pytest.approx(affine(4)[1]), "fewer tokens take no longer, but no less is known"
    assert cost.predict(600) == pytest.approx(2 * affine(300)[1]), "beyond, the safe side"


def test_the_most_tokens_are_predicted_to_fit_and_one_more_is_not() -> None:
    cost = learned(affine(4), affine(60), affine(300))
    for seconds in (0.0141, 0.02, 0.0699, 0.07, 0.2, 0.31, 0.5, 2.0):
        most = cost.most_tokens(seconds)
        assert most is not None
        fits, over = cost.predict(most), cost.predict(most + 1)
        assert fits is not None and over is not None
        assert fits <= seconds + 1e-9 < over + 1e-9
    assert cost.most_tokens(0.0139) == 0


def test_steps_of_a_size_are_averaged_and_later_ones_count_more() -> None:
    cost = learned((8, 9.9), (8, 0.1), (8, 0.3))
    assert cost.predict(8) == pytest.approx(0.2), "the first one had cold caches"
    cost = learned(*[(8, 0.1)] * 50, *[(8, 0.2)] * 50)
    predicted = cost.predict(8)
    assert predicted is not None and 0.195 < predicted < 0.2


def test_a_large_step_takes_at_most_in_proportion_to_a_small_one() -> None:
    """A first prompt, while everything was cold, does not keep those that follow in small pieces."""
    cost = learned((150, 30.0), (16, 0.1), (16, 0.1))
    assert cost.predict(150) == pytest.approx(0.1 * 150 / 16)
    assert cost.most_tokens(0.3) in (47, 48)  # it is rounded down


def test_at_least_a_step_takes_in_proportion_to_the_smallest() -> None:
    cost = learned(affine(60), affine(300))
    assert cost.least(15) == pytest.approx(affine(60)[1] / 4)
    assert cost.least(60) == pytest.approx(affine(60)[1]) and cost.least(180) == cost.predict(180)
    assert StepCost().least(1) == 0.0


def test_a_slow_small_step_does_not_make_large_ones_look_slow() -> None:
    cost = learned((2, 1.0), affine(60), affine(300))
    assert cost.predict(60) == pytest.approx(affine(60)[1])
    most = cost.most_tokens(0.2)
    assert most is not None and most >= 180


def test_overlapping_steps_begin_when_the_one_before_ends() -> None:
    cost = StepCost()
    cost.begin(0, 8, 0.0)
    cost.begin(1, 8, 0.01)  # planned while step 0 ran
    cost.end(0, 0.5)
    cost.end(1, 1.0)
    assert cost.predict(8) == pytest.approx(0.5)
    cost.begin(2, 8, 7.0)  # after a pause
    cost.end(2, 7.5)
    assert cost.predict(8) == pytest.approx(0.5)


def test_steps_without_a_measurable_time_teach_nothing() -> None:
    assert learned((8, 0.0)).predict(8) is None


DECODERS = [Case((i, i), 150, 0, stops=frozenset()) for i in range(3)]
PROMPTS = [Case(tuple(range(300)), 1, at, root=at) for at in (20, 40, 60)]
BIG = Machine(num_blocks=400, max_seqs=6, spare_tokens=600, block_size=8)


def mixed_steps(machine: Machine) -> list[tuple[int, float]]:
    """Tokens of prefill and seconds of the steps in which three sequences decode while others prefill."""
    run = Run([*DECODERS, *PROMPTS], machine)
    steps = []
    for _ in run.steps():
        work = run.device.plans[-1].work
        prefill = sum(w.count for w in work if w.seq > 2)
        if len({w.seq for w in work} & {0, 1, 2}) == 3 and prefill > 1:
            steps.append((prefill, run.device.step_s(sum(w.count for w in work))))
    return steps


@pytest.mark.parametrize("depth", [1, 3])
def test_prefills_are_cut_to_the_gap(depth: int) -> None:
    limited = mixed_steps(Machine(**{**vars(BIG), "max_gap_s": 0.05, "depth": depth}))
    later = limited[len(limited) // 2 :]
    assert all(seconds <= 0.05 + 1e-9 for _, seconds in later)
    assert max(seconds for _, seconds in later) > 0.045, "the gap is made use of"
    free = mixed_steps(Machine(**{**vars(BIG), "depth": depth}))
    assert max(seconds for _, seconds in free) > 0.3


def test_prefills_get_a_multiple_of_what_decoding_takes() -> None:
    """Where decoding sequences take most of the gap."""
    steps = mixed_steps(Machine(**{**vars(BIG), "max_gap_s": 0.014, "min_prefill": 1, "min_prefill_time": 3}))
    alone = affine(3)[1]  # as the device computes
    later = [seconds for _, seconds in steps[len(steps) // 2 :]]
    assert max(later) <= 4 * alone + 1e-9 and max(later) > 3.5 * alone > 0.014


def test_prefills_advance_whatever_the_gap() -> None:
    steps = mixed_steps(Machine(**{**vars(BIG), "max_gap_s": 0.001, "min_prefill": 7}))
    assert len(steps) > 100 and {tokens for tokens, _ in steps} == {7, 900 % 7}


def test_a_step_without_decodes_is_not_limited() -> None:
    run = Run(
        [Case((1, 2), 1, 0), Case(tuple(range(300)), 2, 3)], Machine(**{**vars(BIG), "max_gap_s": 0.001})
    )
    for _ in run.steps():
        pass
    assert max(w.count for plan in run.device.plans for w in plan.work) == 300
