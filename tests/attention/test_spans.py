"""Positions of spans see each other, in every backend: as dense attention has it, and the same bits in any company."""

import dataclasses

import pytest
import torch

from quire.attention.base import Backend, ragged, see_ahead
from quire.attention.cpu import Cpu
from quire.attention.reference import Reference
from quire.models.spans import Spans
from tests.attention.test_backends import (
    CASES,
    LEVELS,
    TOLERANCE,
    Sequences,
    dense,
    name_of,
    needs_cpu,
    paged,
    sequences,
)

BY_NAME = {case.name: case for case in CASES}
LENGTHS = [150, 1, 40]
SPANS = [((3, 90), (90, 92), (100, 131)), (), ((0, 40),)]
STEPS = [[95, 1, 0], [0, 0, 40], [1, 0, 0], [50, 0, 0], [1, 0, 0], [3, 0, 0]]  # which end in none
BACKENDS = [
    *(Reference(4, quantized=quantized) for quantized in (False, True)),
    *(Cpu(level=level, quantized=quantized) for level in LEVELS for quantized in (False, True)),
]
wide_or_not = pytest.mark.parametrize("wide", [False, True], ids=["", "wide"])


@wide_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["grouped", "multi-query", "window", "all"])
@pytest.mark.parametrize("backend", BACKENDS, ids=name_of)
def test_backend_equals_dense_attention(backend: Backend, name: str, dtype: torch.dtype, wide: bool) -> None:
    case = BY_NAME[name]
    data = sequences(case, LENGTHS, dtype)
    want = dense(case, data, 0.2, backend.quantized, SPANS, wide)
    assert all(
        not torch.equal(a, b)
        for a, b in zip(want[::2], dense(case, data, 0.2, backend.quantized)[::2], strict=True)
    )
    for steps in ([LENGTHS], STEPS):
        for got, expected in zip(paged(backend, case, data, 0.2, steps, SPANS, wide), want, strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=TOLERANCE[dtype])


@needs_cpu
@wide_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_cpu_result_is_the_same_bits_for_any_batch_chunks_and_threads(
    dtype: torch.dtype, level: int, wide: bool
) -> None:
    backend, case = Cpu(level=level), BY_NAME["window"]
    data = sequences(case, LENGTHS, dtype)
    together = paged(backend, case, data, 0.2, [LENGTHS], SPANS, wide)
    for got, want in zip(paged(backend, case, data, 0.2, STEPS, SPANS, wide), together, strict=True):
        assert torch.equal(got, want)
    for s, spans in enumerate(SPANS):
        alone = Sequences([data.q[s]], [data.k[s]], [data.v[s]], data.sinks)
        assert torch.equal(paged(backend, case, alone, 0.2, [[LENGTHS[s]]], [spans], wide)[0], together[s])
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        again = paged(backend, case, data, 0.2, [LENGTHS], SPANS, wide)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(again, together, strict=True))


def test_a_layer_sees_no_spans_but_its_own() -> None:
    step = ragged([0], [8], [[0, 1]], 4, spans=[((2, 6),)])
    cache = Reference(4).views(
        torch.zeros(2, BY_NAME["grouped"].shape.num_bytes(4, 4), dtype=torch.uint8),
        0,
        BY_NAME["grouped"].shape,
        torch.float32,
    )
    assert step.until.tolist() == [1, 2, 6, 6, 6, 6, 7, 8] and step.since.tolist() == [0, 1, 2, 2, 2, 2, 6, 7]
    plain, narrow = step.seen_by(cache, None), step.seen_by(cache, None, Spans(tokens=(1,)))
    assert plain.until is None and plain.since is None
    assert narrow.until is step.until and narrow.since is None
    assert step.seen_by(cache, None, Spans(tokens=(1,), wide=True)) is step
    causal = dataclasses.replace(step, until=None, since=None)
    assert causal.seen_by(cache, None, Spans(tokens=(1,))) is causal


def test_steps_without_spans_are_as_they_were() -> None:
    assert see_ahead([0, 10], [5, 3], [(), ((2, 9),)]) is None
    assert ragged([0], [5], [[0, 1]], 4, spans=[((5, 8),)]).until is None
