"""When requests are due: means, spread and shapes of what is drawn, with fixed seeds."""

import math
import random
import statistics
from itertools import pairwise

import pytest

from quire.cli.load import Load
from quire.errors import ConfigError

COUNT = 20_000


def gaps(load: Load, seed: int = 0, count: int = COUNT) -> list[float]:
    return [b - a for a, b in pairwise([0.0, *load.arrivals(count, random.Random(seed))])]


def test_an_infinite_rate_is_all_at_once() -> None:
    assert Load().arrivals(5, random.Random(0)) == [0.0] * 5


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_are_gamma_distributed(burstiness: float) -> None:
    """Mean 1/rate, and a coefficient of variation of 1/sqrt(shape)."""
    found = gaps(Load(rate=50.0, burstiness=burstiness))
    mean, spread = statistics.fmean(found), statistics.pstdev(found)
    assert mean == pytest.approx(1 / 50)
    assert spread / mean == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_poisson_counts_vary_as_their_mean() -> None:
    times = Load(rate=10.0).arrivals(COUNT, random.Random(1))
    seconds = [0] * (COUNT // 10)
    for time in times:
        seconds[min(int(time), len(seconds) - 1)] += 1
    assert statistics.fmean(seconds) == pytest.approx(10)
    assert statistics.pvariance(seconds) == pytest.approx(10, rel=0.1)


def test_gaps_do_not_depend_on_the_ones_before() -> None:
    found = gaps(Load(rate=1.0))
    assert abs(statistics.correlation(found[:-1], found[1:])) < 0.03


def test_infinite_burstiness_is_a_metronome() -> None:
    times = Load(rate=4.0, burstiness=math.inf).arrivals(8, random.Random(0))
    assert times == pytest.approx([0.25 * (i + 1) for i in range(8)])


def test_the_last_arrival_is_where_the_rate_says_for_every_seed() -> None:
    for seed in range(5):
        assert Load(rate=8.0).arrivals(40, random.Random(seed))[-1] == pytest.approx(5.0)


def test_a_seed_draws_the_same_again() -> None:
    load = Load(rate=3.0, burstiness=0.5)
    assert gaps(load, seed=7, count=50) == gaps(load, seed=7, count=50)
    assert gaps(load, seed=7, count=50) != gaps(load, seed=8, count=50)


@pytest.mark.parametrize(("ramp", "middle"), [("linear", 50.5), ("exponential", 10.0)])
def test_ramps_go_from_start_to_end(ramp: str, middle: float) -> None:
    load = Load(ramp=ramp, start=1.0, end=100.0, burstiness=math.inf)
    found = gaps(load, count=101)
    assert [1 / found[i] for i in (0, 50, 100)] == pytest.approx([1.0, middle, 100.0])


def test_ramps_vary_as_gaps_at_a_rate_do() -> None:
    found = gaps(Load(ramp="linear", start=20.0, end=20.0, burstiness=0.5))
    mean = statistics.fmean(found)
    assert mean == pytest.approx(1 / 20, rel=0.03)
    assert statistics.pstdev(found) / mean == pytest.approx(math.sqrt(2), rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, "request_rate is 0.0"),
        ({"rate": math.nan}, "request_rate is nan"),
        ({"burstiness": -1.0}, "burstiness is -1.0"),
        ({"ramp": "sideways"}, "ramp_up_strategy is 'sideways'"),
        ({"ramp": "linear", "rate": 3.0, "start": 1.0, "end": 2.0}, "cannot be given with ramp_up_strategy"),
        ({"ramp": "linear", "start": 1.0}, "ramp_up_end_rps is 0.0"),
    ],
)
def test_impossible_loads_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Load(**options)  # type: ignore[arg-type]
