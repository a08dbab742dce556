"""Attention over a cache that several ranks have in parts: what dense attention over the whole finds."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quire.attention import sparse
from quire.attention.base import Divisible, ragged
from quire.attention.cpu import Cpu
from quire.attention.parted import Parted, choose, merge, part_of, parted
from quire.attention.reference import Reference
from quire.attention.shapes import CacheShape
from quire.errors import ConfigError
from quire.parallel.axis import Axis
from tests.attention import test_sparse
from tests.attention.test_backends import NUM_BLOCKS, TOLERANCE, Case, Sequences, cut, dense, sequences
from tests.parallel.threads import in_ranks

LENGTHS = [70, 1, 3, 65, 33]
SCALE = 0.2
CASES = [
    Case("one key head", 8, CacheShape(1, 16, 16)),
    Case("latent", 12, CacheShape(1, 40, 26, v_in_k=True)),
    Case("window", 8, CacheShape(1, 16, 16), window=24),
    Case("window beyond all", 8, CacheShape(1, 16, 16), window=71),
    Case("softcap", 8, CacheShape(1, 16, 16), softcap=1.5),
    Case("sinks", 8, CacheShape(1, 16, 16), sinks=True),
    Case("all", 8, CacheShape(1, 32, 32), window=12, softcap=2.0, sinks=True),
]


def over_ranks(
    backend: Divisible, case: Case, data: Sequences, steps: list[list[int]], size: int
) -> list[Tensor]:
    """Attention of every position, by `size` ranks that have a part of the heads and of the cache each."""
    found = in_ranks(size, lambda axis: _one_rank(Parted(backend, axis), case, data, steps, axis))
    return [torch.cat(parts, 1) for parts in zip(*found, strict=True)]


def _one_rank(
    backend: Parted, case: Case, data: Sequences, steps: list[list[int]], axis: Axis
) -> list[Tensor]:
    dtype, device, block = data.q[0].dtype, data.q[0].device, backend.block_size * axis.size
    pool_bytes = case.shape.num_bytes(backend.block_size, dtype.itemsize, backend.quantized)
    pool = torch.full((NUM_BLOCKS, pool_bytes), 255, dtype=torch.uint8, device=device)  # NaN in every dtype
    cache, shape = backend.views(pool, 0, case.shape, dtype), case.shape
    free = random.Random(1).sample(range(NUM_BLOCKS), NUM_BLOCKS)
    tables = [[free.pop() for _ in range(-(-len(q) // block))] for q in data.q]
    heads = slice(*(case.num_heads // axis.size * (axis.rank + i) for i in (0, 1)))
    sinks = None if data.sinks is None else data.sinks[heads]
    done, parts = [0] * len(data.q), [[] for _ in data.q]
    for counts in steps:
        work = [(s, slice(done[s], done[s] + count)) for s, count in enumerate(counts) if count]
        starts, ends = ([getattr(part, end) for _, part in work] for end in ("start", "stop"))
        each = [b - a for a, b in zip(starts, ends, strict=True)]
        whole = ragged(starts, each, [tables[s] for s, _ in work], block, device)
        step = part_of(whole, axis.size, axis.rank)
        q, k, v = (torch.cat([x[s][part] for s, part in work]) for x in (data.q, data.k, data.v))
        backend.write(cache, k, None if shape.v_in_k else v, step)
        how = {"scale": SCALE, "window": case.window, "softcap": case.softcap, "sinks": sinks}
        out = backend.attend(q[:, heads], cache, step, **how)
        for (s, part), rows in zip(work, out.split(each), strict=True):
            parts[s].append(rows)
            done[s] = part.stop
    assert done == [len(q) for q in data.q]
    return [torch.cat(rows) for rows in parts]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("quantized", [False, True])
def test_ranks_find_together_what_dense_attention_finds(case: Case, size: int, quantized: bool) -> None:
    """However prompts are cut; sequences shorter than there are ranks included."""
    data = sequences(case, LENGTHS, torch.float32)
    want = dense(case, data, SCALE, quantized)
    for steps in (
        [LENGTHS],
        cut(LENGTHS, seed=size),
        [[0, 0, 2, 64, 32], [0, 0, 1, 1, 1], [70, 1, 0, 0, 0]],
    ):
        for got, expected in zip(
            over_ranks(Reference(4, quantized=quantized), case, data, steps, size), want, strict=True
        ):
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_choose_together_whom_to_see(size: int) -> None:
    """All have the same heads here. Steps choose from their first position on, so that most see all there is."""
    data, count = test_sparse.sequences(LENGTHS), 12

    def one(axis: Axis) -> list[Tensor]:
        backend, caches = Parted(Reference(4), axis), []
        for shape in (test_sparse.LATENT, test_sparse.INDEX):
            pool = torch.full((NUM_BLOCKS, shape.num_bytes(4, 4)), 255, dtype=torch.uint8)
            caches.append(backend.views(pool, 0, shape, torch.float32))
        tables = [[*range(18 * s, 18 * s + 18)] for s in range(len(LENGTHS))]
        done, found = [0] * len(LENGTHS), [torch.empty(0)] * len(LENGTHS)
        for counts in cut(LENGTHS, seed=size):
            work = [(s, slice(done[s], done[s] + n)) for s, n in enumerate(counts) if n]
            starts, each = [part.start for _, part in work], [counts[s] for s, _ in work]
            whole = ragged(starts, each, [tables[s] for s, _ in work], 4 * size)
            rows = [torch.cat([x[s][part] for s, part in work]) for x in data.parts]
            for cache, keys in zip(caches, (rows[1], rows[3]), strict=True):
                backend.write(cache, keys, None, part_of(whole, size, axis.rank))
            chosen = choose(backend, rows[2], rows[4], caches[1], whole, count)
            out = sparse.attend(backend, rows[0], caches[0], chosen, scale=test_sparse.SCALE)
            for (s, part), some in zip(work, out.split(each), strict=True):
                found[s], done[s] = torch.cat((found[s], some)), part.stop
        return found

    for found in in_ranks(size, one):
        for s, got in enumerate(found):
            want = test_sparse.dense(data, s, test_sparse.seen(data, s, count))
            torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE[torch.float32])


def test_windows_of_which_ranks_have_not_as_many_are_refused() -> None:
    case = Case("odd", 8, CacheShape(1, 16, 16), window=23)
    data = sequences(case, LENGTHS, torch.float32)

    def one(axis: Axis) -> None:
        with pytest.raises(ValueError, match="window of 23 positions"):
            _one_rank(Parted(Reference(4), axis), case, data, [LENGTHS], axis)

    in_ranks(2, one)


def test_each_rank_has_every_position_once() -> None:
    """Rows without a sequence, as padded steps have, are written and read by nobody."""
    step = ragged([5, 0, 9], [7, 2, 1], [[3, 1], [2, 0], [5, 4]], 8)
    padded = torch.cat((step.slot_mapping, torch.tensor([-1, -1])))
    object.__setattr__(step, "slot_mapping", padded)
    parts = [part_of(step, 2, rank) for rank in range(2)]
    slots = torch.stack([part.slot_mapping for part in parts])
    assert ((slots >= 0).sum(0) == (padded >= 0)).all()
    whole = torch.where(slots >= 0, slots * 2 + torch.tensor([[0], [1]]), -1).amax(0)
    assert torch.equal(whole, padded)
    for part in parts:
        assert part.order is not None and sorted(part.order.tolist()) == list(range(12))
        assert part.order[-2:].tolist() == [10, 11] and part.query_starts[-1] == 10
        assert torch.equal(part.positions, step.positions)
    assert [part.lengths.tolist() for part in parts] == [[6, 6, 1, 1, 0, 5], [5, 6, 0, 1, 0, 5]]


@pytest.mark.parametrize("counts", [[1, 1], [9, 1]])
def test_padding_rows_and_absent_sequences(counts: list[int]) -> None:
    """As a graph's batch has them: what they stand for is nothing, and the others find the same."""
    case, tables = CASES[0], [[2, 4], [5]]
    data, shape = sequences(case, [13, 2], torch.float32), CASES[0].shape
    whole = ragged([13 - counts[0], 2 - counts[1]], counts, tables, 8)
    nobody, rows = torch.zeros(2, dtype=torch.int32), sum(counts)
    padded = replace(
        whole,
        positions=torch.cat((whole.positions, torch.zeros(3, dtype=torch.int64))),
        slot_mapping=torch.cat((whole.slot_mapping, torch.full((3,), -1))),
        query_starts=torch.cat((whole.query_starts, whole.query_starts[-1:].expand(2))),
        lengths=torch.cat((whole.lengths, nobody)),
        block_tables=torch.cat((whole.block_tables, torch.zeros(2, 2, dtype=torch.int32))),
        max_query=1 if max(counts) == 1 else rows + 3,
        max_length=64,
    )
    q = torch.cat((data.q[0][-counts[0] :], data.q[1][-1:], data.q[0][:3]))

    def one(axis: Axis) -> tuple[Tensor, Tensor]:
        backend = Parted(Reference(4), axis)
        pool = torch.full((8, shape.num_bytes(4, 4)), 255, dtype=torch.uint8)
        cache, before = backend.views(pool, 0, shape, torch.float32), ragged([0, 0], [13, 2], tables, 8)
        backend.write(cache, torch.cat(data.k), torch.cat(data.v), part_of(before, 2, axis.rank))
        mine = q[:, 4 * axis.rank :][:, :4]
        steps = (whole, mine[:rows]), (padded, mine)
        found = [
            backend.attend(some, cache, part_of(step, 2, axis.rank), scale=SCALE) for step, some in steps
        ]
        return found[0], found[1]

    for want, got in in_ranks(2, one):
        assert torch.equal(got[:rows], want) and torch.equal(got[rows:], torch.zeros_like(got[rows:]))


@pytest.mark.parametrize("seed", range(5))
def test_merged_parts_are_the_whole(seed: int) -> None:
    """Parts of scores cut anywhere, also into nothing, whose results are anything where they see nothing."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    scores = torch.randn(3, 5, 40, generator=generator) * 30  # [T, H, n]
    values = torch.randn(40, 8, generator=generator)
    ends = sorted(rng.choices(range(41), k=3))
    cuts = [slice(a, b) for a, b in zip([0, *ends], [*ends, 40], strict=True)]
    sums = torch.stack([scores[..., cut].logsumexp(-1) for cut in cuts])
    found = torch.stack([scores[..., cut].softmax(-1) @ values[cut] for cut in cuts])
    found[sums == -torch.inf] = torch.nan
    torch.testing.assert_close(merge(found, sums), scores.softmax(-1) @ values)
    sinks = torch.randn(5, generator=generator) * 30
    with_sinks = torch.cat((scores, sinks.expand(3, 5)[..., None]), -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(merge(found, sums, sinks), with_sinks @ values)


def test_of_nothing_nothing_is_found() -> None:
    found, sums = torch.full((2, 1, 3, 4), torch.nan), torch.full((2, 1, 3), -torch.inf)
    assert torch.equal(merge(found, sums), torch.zeros(1, 3, 4))
    sums[0] = torch.nan
    assert merge(found, sums).isnan().all(), "what is broken is not hidden"


def test_a_backend_that_cannot_is_refused() -> None:
    def made(axis: Axis) -> str:
        with pytest.raises(ConfigError) as error:
            parted(Cpu(), axis)
        return str(error.value)

    assert all("attention backend cpu" in message for message in in_ranks(2, made))
    backend = Reference()
    assert parted(backend, Axis()) is backend
