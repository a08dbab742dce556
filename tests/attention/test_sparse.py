"""Attention to positions that scores choose, against the formula without a cache, over pools that start full of NaN."""

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from quire.attention import sparse
from quire.attention.base import Backend, ragged
from quire.attention.cpu import Cpu
from quire.attention.reference import Reference
from quire.attention.shapes import CacheShape
from tests.attention.test_backends import BUILT, cut, name_of, needs_cpu

CPU = torch.device("cpu")
BACKENDS = [Reference(4), Reference(16), *([Cpu(), Cpu(32)] if BUILT else [])]
LATENT, INDEX = CacheShape(1, 40, 26, v_in_k=True), CacheShape(1, 24, 24, v_in_k=True)
NUM_BLOCKS, NUM_HEADS, INDEX_HEADS = 96, 5, 9
SCALE = 0.2


@dataclass(frozen=True)
class Sequences:
    """Random queries and keys, for attention and for choosing, of all positions of a few sequences."""

    q: list[Tensor]
    k: list[Tensor]
    index_q: list[Tensor]
    index_k: list[Tensor]
    weights: list[Tensor]

    def only(self, s: int) -> "Sequences":
        return Sequences(*(part[s : s + 1] for part in self.parts))

    @property
    def parts(self) -> tuple[list[Tensor], ...]:
        return self.q, self.k, self.index_q, self.index_k, self.weights


def sequences(
    lengths: list[int], dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> Sequences:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> list[Tensor]:
        return [torch.randn(n, *shape, generator=generator).to(device, dtype) for n in lengths]

    index = draw(INDEX_HEADS, INDEX.k_dim), draw(1, INDEX.k_dim)
    weights = [torch.randn(n, INDEX_HEADS, generator=generator).to(device) for n in lengths]
    return Sequences(draw(NUM_HEADS, LATENT.k_dim), draw(1, LATENT.k_dim), *index, weights)


def seen(data: Sequences, s: int, count: int, *, relu: bool = True, weighted: bool = True) -> Tensor:
    """Which positions each of a sequence's positions sees [n, n], by the formula in float64."""
    products = torch.einsum("qhd,kd->qhk", data.index_q[s].double(), data.index_k[s][:, 0].double())
    products = products.relu() if relu else products
    weights = data.weights[s].double() if weighted else torch.ones_like(data.weights[s]).double()
    scores = torch.einsum("qhk,qh->qk", products, weights)
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    order = scores.masked_fill(future, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(future).scatter_(1, order[:, :count], True) & ~future


def dense(data: Sequences, s: int, mask: Tensor) -> Tensor:
    """Attention of a sequence's positions to those in mask [n, n], in float64."""
    q, k = data.q[s].double(), data.k[s][:, 0].double()
    scores = (torch.einsum("qhd,kd->hqk", q, k) * SCALE).masked_fill(~mask, -torch.inf)
    return torch.einsum("hqk,kd->qhd", scores.softmax(-1), k[:, : LATENT.v_dim])


def paged(backend: Backend, data: Sequences, count: int, steps: list[list[int]]) -> list[Tensor]:
    """The same through the caches; steps[i][s] positions of sequence s are computed in step i."""
    dtype, device, size = data.q[0].dtype, data.q[0].device, backend.block_size
    caches = []
    for shape in (LATENT, INDEX):
        share = shape.num_bytes(size, dtype.itemsize)
        pool = torch.full((NUM_BLOCKS, 64 + share), 255, dtype=torch.uint8, device=device)
        caches.append(backend.views(pool, 64, shape, dtype))
    free = random.Random(1).sample(range(NUM_BLOCKS), NUM_BLOCKS)
    tables = [[free.pop() for _ in range(-(-len(q) // size))] for q in data.q]
    done, found = [0] * len(data.q), [[] for _ in data.q]
    for counts in steps:
        chosen = [s for s, n in enumerate(counts) if n]
        step = ragged(
            *([done[s] for s in chosen], [counts[s] for s in chosen], [tables[s] for s in chosen]),
            *(size, device),
        )
        rows = [slice(done[s], done[s] + counts[s]) for s in chosen]
        q, k, index_q, index_k, weights = (
            torch.cat([part[s][row] for s, row in zip(chosen, rows, strict=True)]) for part in data.parts
        )
        for cache, keys in zip(caches, (k, index_k), strict=True):
            backend.write(cache, keys, None, step)
        if step.max_length <= count:  # as the layer has it
            out = backend.attend(q, caches[0], step, scale=SCALE)
        else:
            whom = sparse.choose(backend, index_q, weights, caches[1], step, count)
            out = sparse.attend(backend, q, caches[0], whom, scale=SCALE)
        for s, part in zip(chosen, out.split([counts[s] for s in chosen]), strict=True):
            found[s].append(part)
            done[s] += len(part)
    return [torch.cat(parts) for parts in found]


def check(
    backend: Backend, count: int, lengths: list[int], *steps: list[int], device: torch.device = CPU
) -> None:
    """Sequences of these lengths, in one step and in these `steps`."""
    data = sequences(lengths, device=device)
    want = [dense(data, s, seen(data, s, count)) for s in range(len(lengths))]
    for parts in ([lengths], list(steps)):
        for got, expected in zip(paged(backend, data, count, parts), want, strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS, ids=name_of)
def test_the_chosen_are_attended_to(backend: Backend) -> None:
    lengths = [45, 1, 16, 70, 9]
    check(backend, 12, lengths, *cut(lengths, seed=2))


def test_each_part_of_the_formula_changes_the_choice() -> None:
    data = sequences([70])
    want = seen(data, 0, 12)
    assert int(want[-1].sum()) == 12 and int(want[5].sum()) == 6
    for other in (
        seen(data, 0, 12, relu=False),
        seen(data, 0, 12, weighted=False),
        seen(data, 0, 13),
    ):
        assert (dense(data, 0, other)[13:] - dense(data, 0, want)[13:]).abs().max() > 1e-2


@pytest.mark.parametrize("backend", BACKENDS, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_read_is_what_was_written(backend: Backend, dtype: torch.dtype) -> None:
    size, tables = backend.block_size, [list(range(NUM_BLOCKS))[::-1]]
    pool = torch.full((NUM_BLOCKS, 64 + LATENT.num_bytes(size, dtype.itemsize)), 255, dtype=torch.uint8)
    cache, keys = backend.views(pool, 64, LATENT, dtype), sequences([77], dtype).k[0]
    step = ragged([0], [77], tables, size)
    backend.write(cache, keys, None, step)
    order = torch.randperm(77, generator=torch.Generator().manual_seed(1))
    assert torch.equal(backend.read(cache, step.slot_mapping[order].int()), keys[order])


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory", [2**14, 2**28], ids=["in pieces", "at once"])
def test_cpu_result_is_the_same_bits_for_any_batch_chunks_and_threads(
    dtype: torch.dtype, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, lengths, count = Cpu(), [2 * sparse.SPAN + 30, 17, 64], 20
    data = sequences(lengths, dtype)
    together = paged(backend, data, count, [lengths])
    monkeypatch.setattr(sparse, "CHOICE_BYTES", memory)
    for steps in (
        cut(lengths, 3),
        cut(lengths, 4),
        [[lengths[0] - 3, 0, 0], [1, 17, 0], [1, 0, 64], [1, 0, 0]],
    ):
        for got, want in zip(paged(backend, data, count, steps), together, strict=True):
            assert torch.equal(got, want)
    for s in range(len(lengths)):
        assert torch.equal(paged(backend, data.only(s), count, [[lengths[s]]])[0], together[s])
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        again = paged(backend, data, count, [lengths])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(again, together, strict=True))


@pytest.mark.parametrize("backend", BACKENDS, ids=name_of)
def test_nan_stays_in_its_sequence(backend: Backend) -> None:
    data = sequences([30, 30])
    fine = paged(backend, data, 8, [[30, 30]])[1]
    data.index_k[0][3] = data.k[0][3] = torch.nan
    broken, again = paged(backend, data, 8, [[30, 30]])
    assert bool(broken[3:].isnan().all()) and not bool(broken[:3].isnan().any())
    torch.testing.assert_close(again, fine, rtol=0, atol=2e-5)


def test_of_equal_scores_the_first_are_taken() -> None:
    lowest = -torch.inf
    scores = torch.tensor(
        [
            [1.0, 2.0, 1.0, 3.0, 1.0, 0.0],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            [5.0, 1.0, lowest, lowest, lowest, lowest],
            [0.0, 1.0, 2.0, torch.nan, -1.0, 5.0],
            [-0.0, 0.0, 1.0, -1.0, 0.0, lowest],
        ]
    )
    assert sparse.best(scores, 3).tolist() == [[0, 1, 3], [0, 1, 2], [0, 1, 2], [2, 3, 5], [0, 1, 2]]
