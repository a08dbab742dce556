"""The planted bugs of `scripts/mutants.py`: each still applies, and each is found."""

import pytest

from scripts.mutants import MUTANTS, Mutant, main, planted


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_the_bug_applies(mutant: Mutant) -> None:
    assert planted(mutant)


@pytest.mark.slow
def test_every_bug_is_found() -> None:
    assert main([]) == 0
