"""The Triton backend: small shapes, in Triton's interpreter where there is no GPU."""

import dataclasses

import pytest
import torch

from quire.attention.base import Shared, Turn, ragged, turn_and_write
from quire.attention.parted import merge, part_of
from quire.attention.reference import Reference
from quire.attention.select import select
from quire.attention.shapes import CacheShape
from quire.attention.triton.backend import Triton, halves
from tests.attention import test_sparse
from tests.attention.test_backends import CASES, TOLERANCE, Case, Sequences, dense, paged, sequences

pytest.importorskip("triton")

from tests.interpreter import INTERPRETED  # noqa: E402  (it imports Triton)

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
BY_NAME = {case.name: case for case in CASES}
CASES_IN_PARTS = BY_NAME | {"window of 24": dataclasses.replace(BY_NAME["window"], window=24)}
LENGTHS = [37, 1, 20]
STEPS = [
    [30, 1, 10],
    [1, 0, 1],
    [6, 0, 1],
    [0, 0, 8],
]  # mixed, one position each, few positions, one sequence

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning:triton"
)  # numpy's, of numbers that masks hide


@pytest.mark.parametrize(
    ("name", "dtype", "block_size"),
    [
        ("grouped", torch.float32, 64),
        ("grouped", torch.float16, 16),
        ("group of 5", torch.float32, 16),
        ("odd dims", torch.float32, 16),
        ("dims differ", torch.float16, 64),
        ("window", torch.float32, 4),
        ("window of 1", torch.float32, 64),
        ("softcap", torch.float32, 64),
        ("sinks", torch.float32, 16),
        ("all", torch.float16, 64),
        ("latent", torch.float32, 64),
        ("wide latent", torch.float32, 16),
    ],
)
def test_kernels_equal_dense_attention(name: str, dtype: torch.dtype, block_size: int) -> None:
    case = BY_NAME[name]
    data, backend = sequences(case, LENGTHS, dtype, device=DEVICE), Triton(block_size)
    want = dense(case, data, 0.2)
    for got, expected in zip(paged(backend, case, data, 0.2, STEPS), want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("invariant", [False, True], ids=["", "invariant"])
@pytest.mark.parametrize(
    ("name", "block_size", "wide"),
    [
        ("grouped", 64, False),
        ("group of 5", 16, False),
        ("window", 4, False),
        ("window", 16, True),
        ("all", 64, True),
    ],
)
def test_positions_of_spans_see_each_other(name: str, block_size: int, wide: bool, invariant: bool) -> None:
    """One that fills a few rows too, which other kernels would compute if they saw those before them only."""
    case, backend = BY_NAME[name], Triton(block_size, invariant)
    data = sequences(case, LENGTHS, torch.float32, device=DEVICE)
    spans = [((3, 30), (31, 36)), (), ((10, 12), (12, 20))]
    want = dense(case, data, 0.2, False, spans, wide)
    steps = [[30, 1, 10], [1, 0, 2], [6, 0, 0], [0, 0, 8]]
    for some in ([LENGTHS], steps):
        for got, expected in zip(paged(backend, case, data, 0.2, some, spans, wide), want, strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("length", [1, 64, 65, 200])
def test_many_splits_are_merged(length: int) -> None:
    case = Case("single", 4, CacheShape(1, 16, 16), sinks=True)
    data = sequences(case, [1, length, 1], torch.float32, device=DEVICE)  # the long one starts within a piece
    steps = [[0, length - 1, 0], [1, 1, 1]] if length > 1 else [[1, 1, 1]]
    for got, want in zip(paged(Triton(16), case, data, 0.2, steps), dense(case, data, 0.2), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["all", "window", "latent"])
def test_an_invariant_backend_computes_the_same_bits_for_any_batch_and_chunks(name: str) -> None:
    case, backend = BY_NAME[name], Triton(16, invariant=True)
    data = sequences(case, LENGTHS, torch.float32, device=DEVICE)
    together = paged(backend, case, data, 0.2, [LENGTHS])
    for got, want in zip(paged(backend, case, data, 0.2, STEPS), together, strict=True):
        assert torch.equal(got, want)
    alone = Sequences(data.q[:1], data.k[:1], data.v[:1], data.sinks)
    assert torch.equal(paged(backend, case, alone, 0.2, [[LENGTHS[0]]])[0], together[0])


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "dtype", "block_size", "invariant"),
    [
        ("grouped", torch.float16, 16, False),
        ("group of 5", torch.float32, 4, True),
        ("window of 24", torch.float32, 16, False),
        ("softcap", torch.float32, 64, False),
        ("wide latent", torch.float32, 16, False),
    ],
)
def test_parts_of_a_cache_are_merged(
    name: str, dtype: torch.dtype, block_size: int, invariant: bool, size: int
) -> None:
    """Of rows that see nothing of a part, and of those that see all."""
    case = CASES_IN_PARTS[name]
    data, backend = sequences(case, LENGTHS, dtype, device=DEVICE), Triton(block_size, invariant)
    shape, how = case.shape, {"scale": 0.2, "window": case.window and case.window // size}
    pool_bytes = shape.num_bytes(block_size, dtype.itemsize)
    pools = [torch.full((16, pool_bytes), 255, dtype=torch.uint8, device=DEVICE) for _ in range(size)]
    caches = [backend.views(pool, 0, shape, dtype) for pool in pools]
    tables, done, want = [[*range(5)], [5], [*range(6, 16)]], [0] * len(LENGTHS), dense(case, data, 0.2)
    for counts in STEPS:
        work = [(s, slice(done[s], done[s] + n)) for s, n in enumerate(counts) if n]
        starts = [part.start for _, part in work]
        whole = ragged(
            *(starts, [counts[s] for s, _ in work], [tables[s] for s, _ in work], block_size * size, DEVICE)
        )
        q, k, v = (torch.cat([x[s][part] for s, part in work]) for x in (data.q, data.k, data.v))
        found = []
        for rank, cache in enumerate(caches):
            step = part_of(whole, size, rank)
            backend.write(cache, k, None if shape.v_in_k else v, step)
            rows = torch.arange(len(q), device=DEVICE) if step.order is None else step.order
            parts = backend.attend_part(q[rows], cache, step, **how, softcap=case.softcap)
            found.append([torch.empty_like(part).index_copy_(0, rows, part) for part in parts])
        got = merge(*(torch.stack(parts) for parts in zip(*found, strict=True)))
        expected = torch.cat([want[s][part] for s, part in work])
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=TOLERANCE[dtype])
        done = [a + n for a, n in zip(done, counts, strict=True)]


@pytest.mark.parametrize("counts", [[1, 1], [40, 1]])
def test_padding_rows_and_absent_sequences(counts: list[int]) -> None:
    """As a graph's batch has them: sequences without queries, rows without a sequence, slots that are -1."""
    case = BY_NAME["grouped"]
    data = sequences(case, [40, 7], torch.float32, device=DEVICE)
    k, v = torch.cat(data.k), torch.cat(data.v)
    pool = torch.zeros(8, case.shape.num_bytes(64, 4), dtype=torch.uint8, device=DEVICE)
    backend, oracle = Triton(64), Reference(64)
    cache, plain = (b.views(pool, 0, case.shape, torch.float32) for b in (backend, oracle))
    backend.write(cache, k, v, ragged([0, 0], [40, 7], [[2], [5]], 64, DEVICE))
    written = pool.clone()
    step = ragged([40 - counts[0], 6], counts, [[2], [5]], 64, DEVICE)
    q = torch.cat((data.q[0][-counts[0] :], data.q[1][-1:], data.q[0][:3]))
    want = oracle.attend(q, plain, step, scale=0.1)
    nobody = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    padded = dataclasses.replace(
        step,
        slot_mapping=torch.full((len(q),), -1, device=DEVICE),
        query_starts=torch.cat((step.query_starts, step.query_starts[-1:].expand(2))),
        lengths=torch.cat((step.lengths, nobody)),
        block_tables=torch.cat((step.block_tables, nobody[:, None])),
    )
    backend.write(cache, k[: len(q)], v[: len(q)], padded)
    assert torch.equal(pool, written)
    got = backend.attend(q, cache, padded, scale=0.1)
    assert torch.equal(got[sum(counts) :], torch.zeros_like(got[sum(counts) :]))
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


def test_a_step_whose_tensors_are_written_in_place() -> None:
    """Two layers share the division of a step; it is made again when the first of them comes again."""
    case = BY_NAME["grouped"]
    data = sequences(case, [40], torch.float32, device=DEVICE)
    share = case.shape.num_bytes(64, 4)
    pool = torch.zeros(2, 2 * share, dtype=torch.uint8, device=DEVICE)
    backend, oracle = Triton(64), Reference(64)
    layers = [[b.views(pool, at, case.shape, torch.float32) for at in (0, share)] for b in (backend, oracle)]
    whole = ragged([0], [40], [[1]], 64, DEVICE)
    for layer, scale in zip(layers[0], (1.0, 2.0), strict=True):
        backend.write(layer, data.k[0] * scale, data.v[0] * scale, whole)
    step = ragged([11], [1], [[1]], 64, DEVICE)
    for length in (12, 33, 40):
        step.lengths.fill_(length)
        for layer, plain in zip(*layers, strict=True):
            got = backend.attend(data.q[0][:1], layer, step, scale=0.1)
            want = oracle.attend(data.q[0][:1], plain, step, scale=0.1)
            torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "dim", "half", "normed", "interleaved"),
    [(4, 2, 32, 16, True, False), (5, 1, 24, 8, True, True), (3, 3, 18, 5, False, False)],
)
def test_turning_and_storing_at_once(
    num_heads: int, num_kv_heads: int, dim: int, half: int, normed: bool, interleaved: bool, apart: bool
) -> None:
    """As the two operations do it; of what has no slot, only the queries turn."""
    shape, backend, tokens = CacheShape(num_kv_heads, dim, dim), Triton(16), 21
    generator = torch.Generator().manual_seed(dim)
    heads = torch.randn(tokens, num_heads + 2 * num_kv_heads, dim, generator=generator).to(DEVICE)
    angles = torch.randn(64, half, generator=generator).to(DEVICE)
    weights = torch.randn(num_heads + num_kv_heads, dim, generator=generator).to(DEVICE) if normed else None
    at = torch.arange(40, 40 - tokens, -1, device=DEVICE) if apart else None
    turn = Turn(angles.cos(), angles.sin(), interleaved, weights, 1e-6, at)
    step = ragged([7], [tokens], [[2, 0]], 16, DEVICE)
    step.slot_mapping[4] = -1
    pools = [torch.zeros(3, shape.num_bytes(16, 4), dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    caches = [backend.views(pool, 0, shape, torch.float32) for pool in pools]
    got = backend.place(caches[0], heads.clone(), turn, step)
    want = turn_and_write(backend, caches[1], heads.clone(), turn, step)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    for kind in (0, 1):
        stored = [(cache.k, cache.v)[kind] for cache in caches]
        torch.testing.assert_close(stored[0], stored[1], rtol=0, atol=1e-5)
        assert stored[0].any()


def sharing(groups: list[tuple[list[int], int]], num_seqs: int, size: int, spare: int) -> Shared:
    """As the runner lays it out: groups of rows with their numbers of common pages, and room for `spare` more."""
    parts = [(rows[i : i + size], pages) for rows, pages in groups for i in range(0, len(rows), size)]
    members = torch.full((len(parts) + spare, size), -1, dtype=torch.int32)
    pages, own = torch.zeros(len(parts) + spare, dtype=torch.int32), torch.zeros(num_seqs, dtype=torch.int32)
    for i, (rows, count) in enumerate(parts):
        members[i, : len(rows)], pages[i] = torch.tensor(rows), count
        own[torch.tensor(rows)] = count
    return Shared(members.to(DEVICE), pages.to(DEVICE), own.to(DEVICE))


@pytest.mark.parametrize(
    ("name", "dtype", "block_size"),
    [
        ("grouped", torch.float32, 64),
        ("grouped", torch.float16, 16),
        ("dims differ", torch.float32, 16),
        ("window", torch.float32, 16),
        ("softcap", torch.float32, 16),
        ("sinks", torch.float32, 16),
        ("wide latent", torch.float32, 64),
    ],
)
def test_a_common_beginning_is_attended_once(name: str, dtype: torch.dtype, block_size: int) -> None:
    """The same results as without sharing, for groups larger than a tile, loners, padding, and rows in any order."""
    case, num_seqs = BY_NAME[name], 9
    generator = torch.Generator().manual_seed(7)
    pages = 320 // block_size
    lengths = [pages * block_size + n for n in (1, 40, 100, 2, 65)] + [33, 150 + 64, 64 + 3, 1]
    lengths[3] = 1  # it has ended: one position is left, in a page that it shares
    groups = [([0, 2, 1, 4, 3], pages), ([7, 6], 64 // block_size)]
    tables: list[list[int]] = []
    blocks = iter(range(1000))
    common = {0: [next(blocks) for _ in range(pages)], 1: [next(blocks) for _ in range(64 // block_size)]}
    for row, length in enumerate(lengths):
        mine = next((common[g] for g, (rows, _) in enumerate(groups) if row in rows), [])
        tables.append([*mine, *(next(blocks) for _ in range(-(-length // block_size) - len(mine)))])
    step = ragged([n - 1 for n in lengths], [1] * num_seqs, tables, block_size, DEVICE)
    num_pages = next(blocks)
    backend, oracle = Triton(block_size), Reference(block_size)
    size = case.shape.num_bytes(block_size, dtype.itemsize)
    numbers = torch.randn(num_pages, size // dtype.itemsize, generator=generator).to(dtype)
    pool = numbers.to(DEVICE).view(torch.uint8)
    q = torch.randn(num_seqs + 2, case.num_heads, case.shape.k_dim, generator=generator).to(dtype).to(DEVICE)
    nobody = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    padded = dataclasses.replace(
        step,
        query_starts=torch.cat((step.query_starts, step.query_starts[-1:].expand(2))),
        lengths=torch.cat((step.lengths, nobody)),
        block_tables=torch.cat((step.block_tables, step.block_tables[:2])),
        shared=sharing(groups, num_seqs + 2, size=4, spare=2),
    )
    how = {"scale": 0.2, "window": case.window, "softcap": case.softcap}
    how["sinks"] = torch.randn(case.num_heads, generator=generator).to(DEVICE) if case.sinks else None
    got = backend.attend(q, backend.views(pool, 0, case.shape, dtype), padded, **how)
    want = oracle.attend(q[:num_seqs].float(), oracle.views(pool, 0, case.shape, dtype), step, **how)
    torch.testing.assert_close(got[:num_seqs].float(), want.float(), rtol=0, atol=TOLERANCE[dtype])
    assert not got[num_seqs:].any()
    poisoned = numbers.clone()
    poisoned[common[0][0]] += 1.0
    other = backend.attend(
        q, backend.views(poisoned.to(DEVICE).view(torch.uint8), 0, case.shape, dtype), padded, **how
    )
    moved = [row for row in range(num_seqs) if not torch.equal(other[row], got[row])]
    assert moved == ([3] if case.window else [0, 1, 2, 3, 4])


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "dim", "half", "normed", "interleaved"),
    [
        (4, 2, 32, 16, True, False),
        (5, 1, 24, 8, True, True),
        (3, 3, 18, 5, False, False),
        (6, 2, 80, 40, True, False),
        (36, 1, 16, 8, False, True),  # more rows of a key head than one program takes
    ],
)
def test_newest_tokens_are_turned_stored_and_attended_at_once(
    num_heads: int, num_kv_heads: int, dim: int, half: int, normed: bool, interleaved: bool
) -> None:
    """As by two operations, for short sequences and long ones that several programs share; not for padding.

    Their positions are not those since the first of what they see. One of them has no slot, as one that has ended:
    nothing of it is stored, and nobody asks what it attends.
    """
    shape, lengths = CacheShape(num_kv_heads, dim, dim), [1, 16, 17, 150, 1]
    backend, oracle = Triton(16), Reference(16)
    generator = torch.Generator().manual_seed(dim)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(DEVICE)

    angles = draw(160, half)
    weights = draw(num_heads + num_kv_heads, dim) if normed else None
    turn = Turn(angles.cos(), angles.sin(), interleaved, weights, 1e-6)
    tables = [[0], [1], [2, 3], list(range(4, 14)), [4]]
    pools = [torch.zeros(14, shape.num_bytes(16, 4), dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    caches = [
        b.views(pool, 0, shape, torch.float32) for b, pool in zip((backend, oracle), pools, strict=True)
    ]
    before = ragged([0] * 5, [length - 1 for length in lengths], tables, 16, DEVICE)
    k, v = (draw(sum(lengths) - 5, num_kv_heads, dim) for _ in range(2))
    for b, cache in zip((backend, oracle), caches, strict=True):
        b.write(cache, k, v, before)
    step = ragged([length - 1 for length in lengths], [1] * 5, tables, 16, DEVICE)
    step.slot_mapping[4] = -1
    step = dataclasses.replace(step, positions=step.positions + 9)  # chunks that begin there
    heads = draw(7, num_heads + 2 * num_kv_heads, dim)
    nobody = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    padded = dataclasses.replace(
        step,
        positions=torch.cat((step.positions, nobody)),
        slot_mapping=torch.cat((step.slot_mapping, nobody - 1)),
        query_starts=torch.cat((step.query_starts, step.query_starts[-1:].expand(2))),
        lengths=torch.cat((step.lengths, nobody)),
        block_tables=torch.cat((step.block_tables, nobody[:, None].expand(2, 10))),
    )
    at = torch.tensor([3, 0, 90, 20, 8, 0, 0], device=DEVICE)  # rows apart from positions
    for whole in (turn, dataclasses.replace(turn, at=at)):
        part = whole if whole.at is None else dataclasses.replace(whole, at=at[:5])
        got = backend.attend_turned(heads.clone(), caches[0], whole, padded, scale=0.2, window=40)
        want = oracle.attend_turned(heads[:5].clone(), caches[1], part, step, scale=0.2, window=40)
        torch.testing.assert_close(got[:4], want[:4], rtol=0, atol=2e-5)
        assert not got[5:].any()
        for ours, theirs in ((caches[0].k, caches[1].k), (caches[0].v, caches[1].v)):
            torch.testing.assert_close(ours[..., :dim], theirs, rtol=0, atol=1e-5)


def test_a_head_dimension_is_two_powers_of_two() -> None:
    found = {dim: halves(dim) for dim in (10, 16, 22, 64, 80, 96, 112, 128, 192, 256, 576)}
    assert found[10] == found[16] == (16, 0) and found[22] == (16, 16)
    assert found[80] == (64, 16) and found[96] == (64, 32) and found[112] == (64, 64)
    assert found[64] == (64, 0) and found[576] == (512, 64) and found[192] == (128, 64)
    assert all(sum(parts) >= dim for dim, parts in found.items())


def test_too_wide_a_head_is_refused() -> None:
    pool = torch.zeros(1, 2**20, dtype=torch.uint8)
    with pytest.raises(ValueError, match="exceed the 576.*attention_backend 'reference'"):
        Triton().views(pool, 0, CacheShape(1, 640, 640), torch.float16)


@pytest.mark.skipif(not INTERPRETED, reason="there is a GPU")
def test_without_a_gpu_the_next_backend_is_taken() -> None:
    assert "NVIDIA" in str(Triton().why_not(torch.float32, torch.device("cpu")))
    assert select(("triton", "reference"), torch.float32, torch.device("cpu")).name == "reference"


@pytest.mark.parametrize(("block_size", "invariant"), [(16, True), (64, False)])
def test_the_chosen_are_attended_to(block_size: int, invariant: bool) -> None:
    backend = Triton(block_size, invariant=invariant)
    test_sparse.check(backend, 6, [18, 1, 9], [12, 1, 0], [5, 0, 8], [1, 0, 1], device=DEVICE)


def test_an_invariant_backend_chooses_the_same_for_any_batch_and_chunks() -> None:
    data, backend = test_sparse.sequences([19, 1, 10], device=DEVICE), Triton(16, invariant=True)
    together = test_sparse.paged(backend, data, 7, [[19, 1, 10]])
    for got, want in zip(test_sparse.paged(backend, data, 7, [[12, 1, 3], [7, 0, 7]]), together, strict=True):
        assert torch.equal(got, want)
    assert torch.equal(test_sparse.paged(backend, data.only(2), 7, [[10]])[0], together[2])
