"""The compiled kernels equal their references, on vocabularies and distributions that take every path."""

import math

import pytest
import torch

from quire.kernels.cpu.native import library
from quire.parallel.vocabulary import Vocabulary
from quire.sampling import native
from quire.sampling.draw import Controls, draw
from quire.sampling.filters import Filters
from quire.sampling.penalties import penalise, record_of
from quire.sampling.records import Records
from quire.types import SamplingParams

pytestmark = pytest.mark.skipif(library() is None, reason="the C++ kernels were not built")

FILTERS = [
    {},
    {"scale": 0.0},
    {"scale": 2.0},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 3000},
    {"top_p": 0.05},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.01},
    {"scale": 1.6, "top_k": 20, "top_p": 0.95},
    {"scale": 0.5, "top_k": 5000, "top_p": 0.8, "min_p": 0.001},
]


def controls(rows: list[dict[str, float]], vocab_size: int, first_position: int) -> Controls:
    def column(name: str, default: float) -> list[float]:
        return [row.get(name, default) for row in rows]

    top_k = [min(int(k), vocab_size) for k in column("top_k", vocab_size)]
    log_min_p = [math.log(p) if p else -math.inf for p in column("min_p", 0.0)]
    filters = Filters(torch.tensor(log_min_p), torch.tensor(top_k), torch.tensor(column("top_p", 1.0)))
    seeds = torch.arange(len(rows)) * 0x123456789ABCDEF - 2**60
    positions = torch.arange(len(rows)) + first_position
    return Controls(torch.tensor(column("scale", 1.0)), filters, seeds, positions, False, True)


def logits_of(kind: str, num_rows: int, vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocab_size)
    noise = torch.randn(num_rows, vocab_size, generator=generator)
    match kind:
        case "flat":
            return noise * 0.1
        case "wide":
            return noise * 4
        case "tied":
            return noise.round()
        case "equal":
            return torch.full((num_rows, vocab_size), -3.0)
        case "peaked":
            noise[:, vocab_size // 2 : vocab_size // 2 + 9] += 20
            return noise
        case "masked":
            keep = torch.rand(num_rows, vocab_size, generator=generator) < 0.02
            keep[:, -1] = True
            return noise.masked_fill(~keep, -math.inf)
    raise ValueError(kind)


@pytest.mark.parametrize("vocab_size", [1, 3, 255, 20_011])
@pytest.mark.parametrize("kind", ["flat", "wide", "tied", "equal", "peaked", "masked"])
def test_draw(kind: str, vocab_size: int) -> None:
    for first_position in (0, 2**33):
        how = controls(FILTERS, vocab_size, first_position)
        logits = logits_of(kind, len(FILTERS), vocab_size)
        whole = Vocabulary(vocab_size)
        tokens, bad = draw.reference(logits.clone(), how, whole)
        found = draw(logits.clone(), how, whole)
        assert found[0].tolist() == tokens.tolist()
        assert not found[1].any() and not bad.any()


def test_many_draws() -> None:
    """Small differences of the fast logarithm would show here: 3000 draws from nearly flat rows."""
    vocab_size, num_rows = 500, 3000
    how = controls([{}] * num_rows, vocab_size, 17)
    logits, whole = logits_of("flat", num_rows, vocab_size), Vocabulary(vocab_size)
    assert torch.equal(draw(logits, how, whole)[0], draw.reference(logits, how, whole)[0])


def test_rows_may_be_strided() -> None:
    how, whole = controls([{}] * 3, 40, 0), Vocabulary(40)
    logits = logits_of("wide", 6, 40)
    assert torch.equal(draw(logits[::2], how, whole)[0], draw.reference(logits[::2].clone(), how, whole)[0])
    columns = logits_of("wide", 40, 3).T
    assert torch.equal(draw(columns, how, whole)[0], draw.reference(columns.contiguous(), how, whole)[0])


def test_bad_rows() -> None:
    logits, whole = logits_of("wide", 6, 700), Vocabulary(700)
    logits[1, 699] = math.nan
    logits[2, 5] = math.inf
    logits[3] = -math.inf
    logits[4, 0] = -math.nan
    for rows in ([{}] * 6, [{"scale": 0.0}] * 6, [{"top_p": 0.9}] * 6):
        how = controls(rows, 700, 0)
        tokens, bad = draw(logits.clone(), how, whole)
        expected = draw.reference(logits.clone(), how, whole)
        assert bad.tolist() == expected[1].tolist() == [False, True, True, True, True, False]
        assert tokens.tolist() == expected[0].tolist()


@pytest.mark.parametrize("vocab_size", [7, 1000])
def test_penalise(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, vocab_size, generator=generator) * 3
    logits[0, 0] = -math.inf
    params = [
        SamplingParams(repetition_penalty=1.3),
        SamplingParams(repetition_penalty=2.0, frequency_penalty=1.0, presence_penalty=1.0),
        SamplingParams(repetition_penalty=0.7, frequency_penalty=-0.4, presence_penalty=1.1),
    ]
    host = torch.zeros(5, dtype=torch.int64)
    records = Records(host, host)
    for slot, given in enumerate(params):
        outputs = torch.randint(0, vocab_size, (2000,), generator=generator).tolist()
        records.put(slot, record_of(given, range(vocab_size), [1, vocab_size + 4, 3], outputs))
    slots = torch.tensor([2, 4, 0, 3, 1])  # two have none
    expected = logits.clone()
    penalise.reference(expected, slots, records)
    assert torch.equal(expected[1], logits[1]) and not torch.equal(expected[0], logits[0])
    padded = torch.cat((logits, torch.zeros(5, 3)), 1)
    for found in (logits, padded[:, :vocab_size]):
        assert native.penalise(found, slots, records.addresses)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert not padded[:, vocab_size:].any()
