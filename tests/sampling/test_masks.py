"""What grammars allow, on the logits of ranks that have a share of the vocabulary each."""

import numpy as np
import pytest
import torch

from quire.grammar.matchers import Allowed
from quire.kernels.dispatch import Kernel
from quire.parallel.vocabulary import Vocabulary
from quire.sampling.masks import Masks, exclude

SIZE, ROWS = 203, 5


@pytest.mark.parametrize("own", [range(203), range(37), range(37, 101), range(101, 203), range(64, 160)])
@pytest.mark.parametrize("num_words", [7, 9])
@pytest.mark.parametrize("apply", [exclude, exclude.reference])
def test_only_allowed_tokens_of_constrained_rows_stay(own: range, num_words: int, apply: Kernel) -> None:
    """Wrong numbers stay wrong, so that somebody says so; and masks of a step leave nothing behind."""
    vocabulary, masks = Vocabulary(SIZE), Masks(ROWS)
    vocabulary.own = own
    random = np.random.default_rng(3)
    for rows in ([1, 3], [4, 0, 2], []):
        bits = random.random((len(rows), num_words * 32)) < 0.3
        bits[:, 64:96], bits[:, 128:160] = True, False
        words = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
        logits = torch.randn(ROWS, len(own) + 3)[:, : len(own)]  # rows that are not one after the other
        logits[1:3, 3], logits[1:3, 5] = torch.nan, torch.inf
        expected = logits.clone()
        for row, allowed in zip(rows, bits, strict=True):
            for column, token in enumerate(own):
                if not allowed[token]:
                    expected[row, column] -= torch.inf  # of infinity: not a number
        masks.put(Allowed(rows, words, {}))
        apply(logits, masks, vocabulary)
        torch.testing.assert_close(logits, expected, rtol=0, atol=0, equal_nan=True)
