"""What grammars allow, on the logits of ranks that have a share of the vocabulary each."""

import numpy as np
import pytest
import torch

from quire.parallel.vocabulary import Vocabulary
from quire.sampling import rules

SIZE = 100


@pytest.mark.parametrize("own", [range(100), range(37), range(37, 74), range(74, 100), range(64, 96)])
@pytest.mark.parametrize("num_words", [3, 4, 6])
@pytest.mark.parametrize("cached", [1, rules.CACHED_LOGITS])
def test_only_allowed_tokens_of_constrained_rows_stay(
    own: range, num_words: int, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong numbers stay wrong, so that somebody says so."""
    monkeypatch.setattr(rules, "CACHED_LOGITS", cached)  # 1: one row at a time
    vocabulary = Vocabulary(SIZE)
    vocabulary.own = own
    random = np.random.default_rng(3)
    bits = random.random((2, num_words * 32)) < 0.3
    words = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    logits = torch.randn(4, len(own))
    logits[1, 3], logits[1, 5] = torch.nan, torch.inf
    expected = logits.clone()
    for row, allowed in zip((1, 3), bits, strict=True):
        for column, token in enumerate(own):
            if not (token < len(allowed) and allowed[token]):
                expected[row, column] -= torch.inf  # of infinity: not a number
    rules.mask(logits, [1, 3], words, vocabulary)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0, equal_nan=True)
