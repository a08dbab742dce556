"""What ranks do in tests of sampling: each has the logits of its own tokens, and draws what one draws from all."""

import math
from typing import Any

import torch

from quire.models.shard import vocabulary_share
from quire.parallel.axis import Axis
from quire.parallel.vocabulary import Vocabulary
from quire.sampling.draw import draw
from quire.sampling.filters import Filters, thresholds
from quire.sampling.logprobs import score
from quire.sampling.sampler import HostSampled
from quire.types import SamplingParams
from tests.parallel.lives import connect
from tests.sampling.remembering import Remembering
from tests.sampling.test_extras import RULED, WORDS
from tests.sampling.test_filters import CASES
from tests.sampling.test_native import FILTERS, controls, logits_of
from tests.sampling.test_sampler import MIXED

KINDS = ("flat", "wide", "tied", "equal", "peaked", "masked")
SIZES = (7, 255, 3003, 40_021)
MOST = 20  # likeliest tokens: of all there are equal ones, in no order
NEAR: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def shared(size: int, axis: Axis) -> Vocabulary:
    return Vocabulary(size, vocabulary_share(size, axis.size), axis)


def draws(rank: int, args: dict[str, Any]) -> str:
    """Of every distribution and every filter, of rows together and of few; and rows that are no use."""
    _, axes = connect(rank, args)
    for size in SIZES:
        whole, part = Vocabulary(size), shared(size, axes.tp)
        for kind in KINDS:
            logits = logits_of(kind, len(FILTERS), size)
            for rows in (FILTERS, [FILTERS[0]] * len(FILTERS), [{"scale": 0.0}] * len(FILTERS)):
                how = controls(rows, size, 2**33)
                wanted = draw.reference(logits.clone(), how, whole)
                for op in (draw, draw.reference):
                    tokens, bad = op(own(logits, part).clone(), how, part)
                    assert tokens.tolist() == wanted[0].tolist(), (size, kind, rows, op)
                    assert not bad.any()
    return "well"


def bad_rows(rank: int, args: dict[str, Any]) -> str:
    _, axes = connect(rank, args)
    whole, part = Vocabulary(700), shared(700, axes.tp)
    logits = logits_of("wide", 6, 700)
    logits[1, 699], logits[2, 5], logits[3], logits[4, 0] = math.nan, math.inf, -math.inf, -math.nan
    logits[5, :400] = -math.inf  # all of some rank's
    for rows in ([{}] * 6, [{"scale": 0.0}] * 6, [{"top_p": 0.9}] * 6, [{"top_k": 3, "min_p": 0.1}] * 6):
        how = controls(rows, 700, 0)
        wanted = draw.reference(logits.clone(), how, whole)
        for op in (draw, draw.reference):
            tokens, bad = op(own(logits, part).clone(), how, part)
            assert bad.tolist() == [False, True, True, True, True, False]
            assert tokens.tolist() == wanted[0].tolist()
    return "well"


def scores(rank: int, args: dict[str, Any]) -> str:
    """Thresholds, and log probabilities of some tokens, of all and of the chosen one alone."""
    _, axes = connect(rank, args)
    for size in (50, 1503):
        whole, part = Vocabulary(size), shared(size, axes.tp)
        logits = torch.randn(9, size, generator=torch.Generator().manual_seed(size)) * 2
        chosen = torch.arange(9) * (size // 9)
        for k in (0, 5, size):
            for got, want in zip(
                score(own(logits, part), chosen, k, part), score(logits, chosen, k, whole), strict=True
            ):
                torch.testing.assert_close(got, want, **NEAR)
        for min_p, top_k, top_p in CASES:
            columns = (math.log(min_p) if min_p else -math.inf, min(top_k or size, size), top_p)
            filters = Filters(*(torch.tensor([column] * 9) for column in columns))
            found = thresholds(own(logits, part), filters, part)
            torch.testing.assert_close(found, thresholds(logits, filters, whole), rtol=0, atol=0)
    return "well"


def samplers(rank: int, args: dict[str, Any]) -> str:
    """Whatever requests may ask for, over many steps in which counts grow."""
    _, axes = connect(rank, args)
    size = 9001
    given = [*MIXED, *RULED, {"temperature": 0.9, "logprobs": 2, "frequency_penalty": 0.4}]
    alone, part = Remembering(size, len(given)), shared(size, axes.tp)
    mine = Remembering(part, len(given))
    for sampler in (alone, mine):
        for slot, options in enumerate(given):
            sampler.admit(
                slot,
                SamplingParams(**options),
                seed=slot,
                prompt=[20, 21, 22, 23, 900, 8999],
                outputs=[20, 8999] if slot % 2 else [],
                stop_token_ids=(0, 5000, size + 2),
                bad_words=WORDS if slot % 3 else [],
            )
    where = range(len(given))
    for step in range(8):
        logits = torch.randn(len(given), size, generator=torch.Generator().manual_seed(step)) * 2
        positions = [6 + 2 * (slot % 2) + step for slot in where]
        want = alone.sample(logits.clone(), where, positions).to_host()
        same(mine.sample(own(logits, part).clone(), where, positions).to_host(), want)
    return "well"


def own(logits: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    return logits[:, vocabulary.own.start : vocabulary.own.stop]


def same(got: HostSampled, want: HostSampled) -> None:
    assert (got.token_ids, got.bad) == (want.token_ids, want.bad)
    for a, b in zip(got.logprobs, want.logprobs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert (a.token_ids[:MOST], a.ranks[:MOST]) == (b.token_ids[:MOST], b.ranks[:MOST])
            assert len(a.token_ids) == len(b.token_ids)
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), **NEAR)
