"""The planted bugs of `scripts/mutants.py`: each still applies, and each is found."""

import pytest

from scripts.mutants import MUTANTS, Mutant, num_survivors, planted

PARTS = 8  # that may run beside each other


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_the_bug_applies(mutant: Mutant) -> None:
    assert planted(mutant)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_bug_is_found(part: int) -> None:
    assert num_survivors(MUTANTS[part::PARTS]) == 0
