"""What ranks draw that have the logits of some tokens each: the tokens of one that has all, and its scores."""

from collections.abc import Iterator

import pytest

from tests.parallel.ranks import Ranks, expect


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    found = Ranks("tests.sampling.lives")
    yield found
    found.close()


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["draws", "bad_rows", "scores", "samplers"])
def test_ranks_sample_as_one(ranks: Ranks, way: str, size: int, name: str) -> None:
    expect(ranks.run(name, size, way=way, mesh={"tp": size}), "well")
