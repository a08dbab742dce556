"""Every attention backend against plain dense attention, over pools that start full of NaN."""

import dataclasses
import random

import pytest
import torch
from torch import Tensor

from quire.attention.base import Backend, LayerCache, ragged
from quire.attention.cpu import Cpu
from quire.attention.reference import Reference
from quire.attention.select import select
from quire.attention.shapes import CacheShape
from quire.errors import ConfigError
from quire.kernels.cpu.native import isa
from quire.models import spans as rules
from quire.scheduler.spans import Spans

CPU = torch.device("cpu")
BUILT = Cpu().why_not(torch.float32, CPU) is None
LEVELS = range(isa() + 1) if BUILT else ()
BACKENDS = [
    backend
    for quantized in (False, True)
    for backend in (
        *(Reference(size, quantized=quantized) for size in (4, 16)),
        *(Cpu(level=level, quantized=quantized) for level in LEVELS),
        *([Cpu(32, quantized=quantized)] if BUILT else []),
    )
]
NUM_BLOCKS = 96
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}

needs_cpu = pytest.mark.skipif(not BUILT, reason="the C++ kernels are not built")


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one layer's attention and what it does to scores."""

    name: str
    num_heads: int
    shape: CacheShape
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


CASES = [
    Case("multi-head", 3, CacheShape(3, 16, 16)),
    Case("grouped", 8, CacheShape(2, 64, 64)),
    Case("group of 5", 10, CacheShape(2, 32, 32)),
    Case("multi-query", 40, CacheShape(1, 32, 32)),
    Case("odd dims", 4, CacheShape(2, 10, 22)),
    Case("dims differ", 4, CacheShape(2, 48, 80)),
    Case("window of 1", 4, CacheShape(2, 16, 16), window=1),
    Case("window", 4, CacheShape(2, 16, 16), window=21),
    Case("softcap", 4, CacheShape(2, 16, 16), softcap=1.5),
    Case("sinks", 4, CacheShape(2, 16, 16), sinks=True),
    Case("all", 8, CacheShape(2, 32, 32), window=37, softcap=2.0, sinks=True),
    Case("latent", 20, CacheShape(1, 40, 26, v_in_k=True)),
    Case("wide latent", 16, CacheShape(1, 144, 128, v_in_k=True)),
    Case("odd latent", 5, CacheShape(1, 29, 11, v_in_k=True)),
]


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Random queries, keys and values of a few sequences, all positions of each."""

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    sinks: Tensor | None


def sequences(
    case: Case, lengths: list[int], dtype: torch.dtype, seed: int = 0, device: torch.device = CPU
) -> Sequences:
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int, heads: int, dim: int) -> Tensor:
        return torch.randn(n, heads, dim, generator=generator).to(device, dtype)

    shape = case.shape
    k = [draw(n, shape.num_kv_heads, shape.k_dim) for n in lengths]
    v = [x[..., : shape.v_dim] if shape.v_in_k else draw(len(x), shape.num_kv_heads, shape.v_dim) for x in k]
    q = [draw(n, case.num_heads, shape.k_dim) for n in lengths]
    sinks = torch.randn(case.num_heads, generator=generator).to(device) if case.sinks else None
    return Sequences(q, k, v, sinks)


def rounded(x: Tensor) -> Tensor:
    """What is left of x [n, Hkv, D] in a quantized cache: 255 numbers around 0 for each head of a position."""
    top = x.float().abs().amax(-1, keepdim=True)
    return (x.float() * (torch.tensor(127.0) / top)).round().double() * (top / 127).double()


def dense(
    case: Case,
    data: Sequences,
    scale: float,
    quantized: bool = False,
    spans: list[Spans] | None = None,
    wide: bool = False,
) -> list[Tensor]:
    """Attention of every position of every sequence, in float64, without a cache.

    Positions of spans see each other, within the window unless they are `wide`.
    """
    out = []
    for q, k, v, seen in zip(data.q, data.k, data.v, spans or [()] * len(data.q), strict=True):
        if quantized:
            k = torch.cat([rounded(part) for part in k.split(case.shape.k_parts, -1)], -1)
            v = k[..., : case.shape.v_dim] if case.shape.v_in_k else rounded(v)
        group = case.num_heads // case.shape.num_kv_heads
        k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
        if case.softcap:
            scores = case.softcap * (scores / case.softcap).tanh()
        at = torch.arange(len(q), device=q.device)
        together = torch.zeros(len(q), len(q), dtype=torch.bool, device=q.device)
        for start, end in seen:
            together[start:end, start:end] = True
        hidden = (at[None] > at[:, None]) & ~together
        if case.window:
            hidden = hidden | ((at[None] <= at[:, None] - case.window) & ~(together & wide))
        scores = scores.masked_fill(hidden, -torch.inf)
        if data.sinks is not None:
            scores = torch.cat((scores, data.sinks.double()[:, None, None].expand(-1, len(q), 1)), -1)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : len(q)], v))
    return out


def paged(
    backend: Backend,
    case: Case,
    data: Sequences,
    scale: float,
    steps: list[list[int]],
    spans: list[Spans] | None = None,
    wide: bool = False,
) -> list[Tensor]:
    """The same through the cache; steps[i][s] positions of sequence s are computed in step i."""
    dtype, size = data.q[0].dtype, backend.block_size
    offset = 192  # of another layer, which must stay as it is
    pool_bytes = offset + case.shape.num_bytes(size, dtype.itemsize, backend.quantized)
    device = data.q[0].device
    pool = torch.full((NUM_BLOCKS, pool_bytes), 255, dtype=torch.uint8, device=device)  # NaN in every dtype
    cache = backend.views(pool, offset, case.shape, dtype)
    free = random.Random(1).sample(range(NUM_BLOCKS), NUM_BLOCKS)
    tables = [[free.pop() for _ in range(-(-len(q) // size))] for q in data.q]
    done, parts = [0] * len(data.q), [[] for _ in data.q]
    for counts in steps:
        chosen = [s for s, count in enumerate(counts) if count]
        part = [slice(done[s], done[s] + counts[s]) for s in chosen]
        step = ragged(
            *([done[s] for s in chosen], [counts[s] for s in chosen], [tables[s] for s in chosen]),
            *(size, device),
            spans=None if spans is None else [spans[s] for s in chosen],
        ).seen_by(cache, None, rules.Spans(tokens=None, wide=wide))

        def rows(tensors: list[Tensor], chosen: list[int] = chosen, part: list[slice] = part) -> Tensor:
            return torch.cat([tensors[s][p] for s, p in zip(chosen, part, strict=True)])

        backend.write(cache, rows(data.k), None if case.shape.v_in_k else rows(data.v), step)
        out = attend(backend, case, cache, rows(data.q), step, scale, data.sinks)
        for s, rows_of_s in zip(chosen, out.split([counts[s] for s in chosen]), strict=True):
            parts[s].append(rows_of_s)
            done[s] += counts[s]
    assert done == [len(q) for q in data.q]
    assert bool((pool[:, :offset] == 255).all())
    return [torch.cat(p) for p in parts]


def empty_pool(backend: Backend, case: Case) -> Tensor:
    """Eight blocks of float32, of one layer."""
    return torch.zeros(8, case.shape.num_bytes(backend.block_size, 4, backend.quantized), dtype=torch.uint8)


def attend(backend: Backend, case: Case, cache: LayerCache, q: Tensor, step, scale: float, sinks) -> Tensor:
    return backend.attend(q, cache, step, scale=scale, window=case.window, softcap=case.softcap, sinks=sinks)


def cut(lengths: list[int], seed: int) -> list[list[int]]:
    """Random chunks: long ones, single positions, and steps that leave a sequence out."""
    rng, left, steps = random.Random(seed), list(lengths), []
    while any(left):
        counts = [min(n, rng.choice((0, 1, 1, 5, 16, 50))) for n in left]
        left = [n - c for n, c in zip(left, counts, strict=True)]
        steps.append(counts)
    return [counts for counts in steps if any(counts)]


def name_of(value: object) -> str:
    if not isinstance(value, Cpu | Reference):
        return str(value)
    level = f"-isa{value.level}" if isinstance(value, Cpu) else ""
    return f"{value.name}{value.block_size}{level}{'-int8' * value.quantized}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", BACKENDS, ids=name_of)
def test_backend_equals_dense_attention(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    lengths = [70, 1, 16, 65, 33]
    data = sequences(case, lengths, dtype)
    scale = case.shape.k_dim**-0.5
    want = dense(case, data, scale, backend.quantized)
    for steps in ([lengths], cut(lengths, seed=2)):
        for got, expected in zip(paged(backend, case, data, scale, steps), want, strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=TOLERANCE[dtype])


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("quantized", [False, True], ids=["", "int8"])
def test_cpu_result_is_the_same_bits_for_any_batch_chunks_and_threads(
    case: Case, dtype: torch.dtype, level: int, quantized: bool
) -> None:
    backend, lengths = Cpu(level=level, quantized=quantized), [90, 17, 64]
    data = sequences(case, lengths, dtype)
    together = paged(backend, case, data, 0.2, [lengths])
    for steps in (cut(lengths, 3), cut(lengths, 4), [[1, 1, 1]] * 17 + [[1, 0, 1]] * 47 + [[1, 0, 0]] * 26):
        for got, want in zip(paged(backend, case, data, 0.2, steps), together, strict=True):
            assert torch.equal(got, want)
    for s in range(len(lengths)):
        alone = Sequences([data.q[s]], [data.k[s]], [data.v[s]], data.sinks)
        assert torch.equal(paged(backend, case, alone, 0.2, [[lengths[s]]])[0], together[s])
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        again = paged(backend, case, data, 0.2, [lengths])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(again, together, strict=True))


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.shape.num_kv_heads == 1 or c.window], ids=lambda c: c.name
)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("quantized", [False, True], ids=["", "int8"])
def test_threads_that_share_out_a_long_sequence_find_the_same_bits(
    case: Case, dtype: torch.dtype, level: int, quantized: bool
) -> None:
    backend, length = Cpu(level=level, quantized=quantized), 1100
    data = sequences(case, [length], dtype)
    steps = [[length - 3], [1], [1], [1]]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 60):  # as many that even spans are fewer
            torch.set_num_threads(count)
            found.append(paged(backend, case, data, 0.2, steps)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    if not quantized:
        torch.testing.assert_close(
            found[0].double(), dense(case, data, 0.2)[0], rtol=0, atol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize("backend", BACKENDS, ids=name_of)
def test_strided_inputs(backend: Backend) -> None:
    """Queries, keys and values as views of one product, as the layers pass them."""
    case = CASES[1]
    data = sequences(case, [20], torch.float32)
    fused = torch.cat((data.q[0], data.k[0], data.v[0]), 1)
    q, k, v = fused.split((case.num_heads, 2, 2), 1)
    pool = empty_pool(backend, case)
    cache = backend.views(pool, 0, case.shape, torch.float32)
    step = ragged([0], [20], [list(range(-(-20 // backend.block_size)))], backend.block_size)
    backend.write(cache, k, v, step)
    got = backend.attend(q, cache, step, scale=0.1)
    want = dense(case, data, 0.1, backend.quantized)[0]
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS, ids=name_of)
def test_nan_stays_in_its_sequence(backend: Backend) -> None:
    case = CASES[1]
    data = sequences(case, [20, 20], torch.float32)
    data.k[0][3] = torch.nan
    broken, fine = paged(backend, case, data, 0.1, [[20, 20]])
    assert bool(broken[3:].isnan().all()) and not bool(broken[:3].isnan().any())
    want = dense(case, data, 0.1, backend.quantized)[1]
    torch.testing.assert_close(fine.double(), want, rtol=0, atol=2e-5)
    for number in (torch.nan, torch.inf):
        data.k[0][3], data.v[0][7, :, 5] = 0.0, number
        broken, fine = paged(backend, case, data, 0.1, [[20, 20]])
        assert not bool(broken[7:, :, 5].isfinite().any())
        torch.testing.assert_close(fine.double(), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS, ids=name_of)
def test_padding_rows_are_zero_and_written_nowhere(backend: Backend) -> None:
    case = CASES[0]
    data = sequences(case, [9], torch.float32)
    pool = empty_pool(backend, case)
    cache = backend.views(pool, 0, case.shape, torch.float32)
    step = ragged([0], [5], [list(range(4))], backend.block_size)
    slots = torch.cat((step.slot_mapping, torch.full((4,), -1)))
    padded = dataclasses.replace(step, positions=torch.arange(9), slot_mapping=slots)
    backend.write(cache, data.k[0], data.v[0], padded)
    written = pool.clone()
    backend.write(cache, data.k[0][:5], data.v[0][:5], step)
    assert torch.equal(pool, written)
    got = backend.attend(data.q[0], cache, padded, scale=0.1)
    assert torch.equal(got[5:], torch.zeros_like(got[5:]))
    assert torch.equal(got[:5], backend.attend(data.q[0][:5], cache, step, scale=0.1))


def test_selection_takes_the_first_that_can() -> None:
    assert select(("reference",), torch.float16, CPU).name == "reference"
    assert select(("cpu", "reference"), torch.float16, CPU).name == "reference"
    assert select(("cpu", "reference"), torch.float32, CPU, block_size=4).name == "reference"
    assert select(("cpu", "reference"), torch.float32, CPU, forced="reference", block_size=8).block_size == 8


@needs_cpu
def test_selection_prefers_the_kernel() -> None:
    assert select(("cpu", "reference"), torch.bfloat16, CPU).name == "cpu"
    assert select(("cpu", "reference"), torch.bfloat16, CPU, block_size=32).block_size == 32


@pytest.mark.parametrize(
    ("forced", "reason"),
    [
        ("flash", "must be one of cpu, reference, triton"),
        ("triton", "needs an NVIDIA GPU"),
        ("cpu", "float32 and bfloat16|not built"),
    ],
)
def test_a_forced_backend_that_cannot_run_says_why(forced: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        select(("cpu", "reference"), torch.float16, CPU, forced=forced)


@needs_cpu
def test_a_backend_whose_results_depend_on_the_batch_is_not_taken_for_an_invariant_one() -> None:
    assert select(("reference", "cpu"), torch.bfloat16, CPU, invariant=True).name == "cpu"
    with pytest.raises(ConfigError, match="'reference' cannot run here: with deterministic"):
        select(("cpu", "reference"), torch.bfloat16, CPU, forced="reference", invariant=True)
    with pytest.raises(
        ConfigError, match="no attention backend runs torch.float16.* reference: with deterministic"
    ):
        select(("cpu", "reference"), torch.float16, CPU, invariant=True)
