"""What is drawn for a benchmark."""

import random

import pytest

from quire.cli.workload import Shape, Workload
from quire.errors import ConfigError


def test_lengths_are_as_asked() -> None:
    work = Shape(input_len=7, output_len=5, num_prompts=3, n=2).draw(random.Random(0), 50)
    assert work.input_lens == [7, 7, 7]
    assert work.output_lens == (5, 5, 5)
    assert work.num_output_tokens == 30
    assert work.num_tokens == 51
    assert all(0 <= token < 50 for prompt in work.prompts for token in prompt)
    assert len(set(work.prompts)) == 3


def test_ranged_lengths_fill_their_range() -> None:
    work = Shape(input_len=10, output_len=20, num_prompts=400, range_ratio=0.5).draw(random.Random(0), 50)
    assert set(work.input_lens) == set(range(5, 16))
    assert set(work.output_lens) == set(range(10, 31))


def test_a_seed_draws_the_same_again() -> None:
    shape = Shape(input_len=10, output_len=20, num_prompts=5, range_ratio=0.5)
    assert shape.draw(random.Random(3), 50) == shape.draw(random.Random(3), 50)
    assert shape.draw(random.Random(3), 50) != shape.draw(random.Random(4), 50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_len": 0}, "input_len is 0"),
        ({"num_prompts": 0}, "num_prompts is 0"),
        ({"range_ratio": 1.0}, "random_range_ratio is 1.0"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Shape(**{"input_len": 1, "output_len": 1, "num_prompts": 1, **change})


def test_waste_is_the_end_of_last_blocks() -> None:
    work = Workload(
        prompts=((1, 2, 3),), output_lens=(2,)
    )  # lengths 4 and 5, in blocks of 4: 1 and 2 of them
    assert work.cache_waste(4) == pytest.approx(1 - (4 + 5) / (4 + 8))
    assert work.cache_waste(1) == 0
