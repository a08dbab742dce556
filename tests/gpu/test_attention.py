"""The Triton backend at real sizes against the reference: every head size, feature and kind of step.

Keys and values are written by the backend into a pool full of NaN; both layouts are the same where head dimensions
are multiples of 16, so the reference reads what the backend wrote.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from quire.attention.base import LayerCache, Ragged, Shared, Turn, ragged
from quire.attention.reference import Reference
from quire.attention.shapes import CacheShape
from quire.attention.triton.backend import Triton
from quire.scheduler.spans import Spans

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda")
# Root of the summed squares of errors, relative; Triton's bfloat16 weights are rounded before they are multiplied.
TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-5}
SHAPES = {
    "32/8x128": (32, CacheShape(8, 128, 128)),
    "16/8x64": (16, CacheShape(8, 64, 64)),
    "8/1x80": (8, CacheShape(1, 80, 80)),
    "32/32x96": (32, CacheShape(32, 96, 96)),
    "16/4x256": (16, CacheShape(4, 256, 256)),
    "71/1x64": (71, CacheShape(1, 64, 64)),
    "mla16": (16, CacheShape(1, 576, 512, v_in_k=True)),
    "mla128": (128, CacheShape(1, 576, 512, v_in_k=True)),
}
FEATURES: dict[str, dict[str, object]] = {
    "plain": {},
    "window": {"window": 100},
    "softcap": {"softcap": 20.0},
    "sinks": {"sinks": True},
    "all": {"window": 1000, "softcap": 5.0, "sinks": True},
}
STEPS = {  # (positions cached before, positions of this step) of each sequence
    "decode": [(n - 1, 1) for n in (1, 63, 64, 65, 190, 1000, 5000, 16384)],
    "one": [(4095, 1)],
    "few": [(0, 3), (64, 3), (1000, 1), (4000, 2)],
    "mixed": [(0, 300), (0, 64), (0, 1), (499, 129), (4000, 1), (16000, 384), (130, 1)],
}


@dataclass(frozen=True)
class Setup:
    """A filled pool seen by both backends, and a step with its queries."""

    backend: Triton
    cache: LayerCache
    plain: LayerCache
    step: Ragged
    q: Tensor


def setup(
    shape_name: str,
    dtype: torch.dtype,
    chunks: list[tuple[int, int]],
    block_size: int = 64,
    spans: Sequence[Spans] | None = None,
) -> Setup:
    heads, shape = SHAPES[shape_name]
    generator = torch.Generator(GPU).manual_seed(len(chunks))

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=GPU).to(dtype)

    lengths = [a + b for a, b in chunks]
    needed = [-(-n // block_size) for n in lengths]
    order = torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(1)).tolist()
    tables = [[order.pop() for _ in range(n)] for n in needed]
    offset, backend = 320, Triton(block_size)
    pool_shape = (sum(needed) + 3, offset + shape.num_bytes(block_size, dtype.itemsize))
    pool = torch.full(pool_shape, 255, dtype=torch.uint8, device=GPU)
    cache, plain = (b.views(pool, offset, shape, dtype) for b in (backend, Reference(block_size)))
    whole = ragged([0] * len(chunks), lengths, tables, block_size, GPU)
    k = draw(sum(lengths), shape.num_kv_heads, shape.k_dim)
    backend.write(
        cache, k, None if shape.v_in_k else draw(sum(lengths), shape.num_kv_heads, shape.v_dim), whole
    )
    assert bool((pool[:, :offset] == 255).all())
    step = ragged([a for a, _ in chunks], [b for _, b in chunks], tables, block_size, GPU, spans)
    return Setup(backend, cache, plain, step, draw(sum(b for _, b in chunks), heads, shape.k_dim))


def options(name: str, heads: int) -> dict[str, object]:
    chosen = dict(FEATURES[name])
    if chosen.pop("sinks", False):
        chosen["sinks"] = torch.randn(heads, device=GPU, generator=torch.Generator(GPU).manual_seed(5))
    return chosen


def check(s: Setup, feature: str) -> None:
    scale = s.q.shape[-1] ** -0.5
    chosen = options(feature, s.q.shape[1])
    want = Reference(s.backend.block_size).attend(s.q.float(), s.plain, s.step, scale=scale, **chosen)
    got = s.backend.attend(s.q, s.cache, s.step, scale=scale, **chosen)
    error = (got.float() - want).norm() / want.norm()
    worst = (got.float() - want).abs().max() / want.abs().max()
    limit = TOLERANCE[s.q.dtype]
    assert error <= limit and worst <= 4 * limit, (float(error), float(worst))
    assert torch.equal(got, s.backend.attend(s.q, s.cache, s.step, scale=scale, **chosen))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_equals_reference(shape: str, step: str) -> None:
    s = setup(shape, torch.bfloat16, STEPS[step])
    for feature in ("plain", "all"):
        check(s, feature)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("feature", FEATURES)
def test_features_equal_reference(feature: str, step: str) -> None:
    check(setup("32/8x128", torch.bfloat16, STEPS[step]), feature)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", ["32/8x128", "16/8x64", "8/1x80"])
def test_other_types_equal_reference(shape: str, dtype: torch.dtype) -> None:
    for step in ("decode", "mixed"):
        check(setup(shape, dtype, STEPS[step]), "all")


@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_other_block_sizes(block_size: int) -> None:
    for step in ("decode", "mixed"):
        check(setup("32/8x128", torch.bfloat16, STEPS[step], block_size), "plain")


@pytest.mark.parametrize("feature", ["plain", "window", "all"])
@pytest.mark.parametrize("shape", ["32/8x128", "16/4x256", "8/1x80"])
def test_positions_of_spans_see_each_other(shape: str, feature: str) -> None:
    chunks = [(0, 700), (128, 300), (4000, 1), (0, 1)]
    spans = [((3, 260), (260, 262), (300, 700)), ((130, 400),), (), ()]
    seen, blind = (setup(shape, torch.bfloat16, chunks, spans=some) for some in (spans, None))
    check(seen, feature)
    chosen = options(feature, seen.q.shape[1])
    one, other = (s.backend.attend(s.q, s.cache, s.step, scale=0.1, **chosen) for s in (seen, blind))
    assert (
        not torch.equal(one[3], other[3])
        and torch.equal(one[0], other[0])
        and torch.equal(one[-1], other[-1])
    )


def test_large_batches() -> None:
    check(setup("32/8x128", torch.bfloat16, [(37 * i % 700, 1) for i in range(256)]), "plain")
    check(
        setup("32/8x128", torch.bfloat16, [(37 * i % 700, 1 + 5 * (i % 9 == 0)) for i in range(300)]), "plain"
    )


@pytest.mark.parametrize("feature", ["plain", "window", "all"])
@pytest.mark.parametrize("shape", ["32/8x128", "8/1x80", "16/4x256", "mla16"])
def test_an_invariant_backend_computes_the_same_bits_for_any_batch_and_chunks(
    shape: str, feature: str
) -> None:
    """Windows of 100 and 1000 positions are longer than what some chunks see, and shorter than what others do."""
    length, chunks = 1000, (256, 1, 1, 300, 2, 440)
    s = setup(shape, torch.bfloat16, [(0, length), (3000, 1), (0, 77)])
    backend = Triton(64, invariant=True)
    chosen = options(feature, s.q.shape[1])
    together = backend.attend(s.q, s.cache, s.step, scale=0.1, **chosen)
    first, tables = 0, s.step.block_tables.tolist()
    for count in chunks:
        step = ragged([first], [count], [tables[0][: -(-length // 64)]], 64, GPU)
        got = backend.attend(s.q[first : first + count], s.cache, step, scale=0.1, **chosen)
        assert torch.equal(got, together[first : first + count]), (first, count)
        first += count
    assert first == length


def test_one_graph_holds_a_decode_step_of_any_lengths() -> None:
    """Captured at one set of lengths, replayed at others, with two layers and padding; nothing waits."""
    s = setup("32/8x128", torch.bfloat16, [(n - 1, 1) for n in (300, 2000, 64, 1, 777, 4096)])
    step = dataclasses.replace(s.step, slot_mapping=torch.full_like(s.step.slot_mapping, -1))
    k = torch.randn(6, 8, 128, device=GPU, dtype=torch.bfloat16)
    other = dataclasses.replace(s.cache)

    def layers() -> Tensor:
        s.backend.write(s.cache, k, k, step)
        y = s.backend.attend(s.q, s.cache, step, scale=0.1)
        return y + s.backend.attend(s.q, other, step, scale=0.1)

    layers()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layers()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layers()
    for lengths in ([300, 2000, 64, 1, 777, 4096], [1, 1, 1, 1, 1, 1], [299, 3, 60, 1, 700, 0]):
        absent = lengths[-1] == 0
        step.lengths.copy_(torch.tensor(lengths))
        step.query_starts.copy_(torch.tensor([*range(6), 6 - absent]))
        graph.replay()
        want = 2 * Reference(64).attend(s.q.float(), s.plain, step, scale=0.1)
        assert (out.float() - want).norm() / want.norm() <= 8e-3, lengths
        assert not absent or not bool(out[5].any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "half"),
    [
        (32, 8, 128, 64),
        (16, 8, 128, 64),
        (14, 2, 64, 32),
        (8, 4, 256, 128),
        (32, 32, 80, 16),
        (71, 1, 64, 32),
    ],
)
def test_newest_tokens_at_once(heads: int, kv_heads: int, dim: int, half: int, dtype: torch.dtype) -> None:
    """Turned, stored and attended by one kernel as by two, the same bits each time, also from a graph."""
    shape, lengths = CacheShape(kv_heads, dim, dim), [1, 63, 64, 65, 190, 1000, 5000]
    generator = torch.Generator(GPU).manual_seed(dim)

    def draw(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=generator, device=GPU).to(dtype)

    order = iter(torch.randperm(200, generator=torch.Generator().manual_seed(1)).tolist())
    tables = [[next(order) for _ in range(-(-n // 64))] for n in lengths]
    pool = torch.full((200, shape.num_bytes(64, dtype.itemsize)), 255, dtype=torch.uint8, device=GPU)
    backend = Triton(64)
    cache = backend.views(pool, 0, shape, dtype)
    before = ragged([0] * len(lengths), [n - 1 for n in lengths], tables, 64, GPU)
    backend.write(
        cache, *(draw(sum(lengths) - len(lengths), kv_heads, dim, dtype=dtype) for _ in "kv"), before
    )
    step = ragged([n - 1 for n in lengths], [1] * len(lengths), tables, 64, GPU)
    angles, x = draw(5000, half), draw(len(lengths), heads + 2 * kv_heads, dim, dtype=dtype)
    start, limit = pool.clone(), TOLERANCE[dtype]
    for norm in (None, draw(heads + kv_heads, dim)):
        turn = Turn(angles.cos(), angles.sin(), norm is None, norm, 1e-6)
        pool.copy_(start)
        want = backend.attend(
            backend.place(cache, x.clone(), turn, step), cache, step, scale=dim**-0.5
        ).float()
        stored = cache.k.float().nan_to_num(), cache.v.clone()
        pool.copy_(start)
        got = backend.attend_turned(x.clone(), cache, turn, step, scale=dim**-0.5)  # it may work in place
        assert (got.float() - want).norm() / want.norm() <= limit
        assert (cache.k.float().nan_to_num() - stored[0]).norm() / stored[0].norm() <= limit
        assert torch.equal(cache.v.view(torch.uint8), stored[1].view(torch.uint8))
        graph, out = torch.cuda.CUDAGraph(), torch.empty_like(got)
        with torch.cuda.graph(graph):
            for _ in range(2):  # the second one may be launched before the first has ended
                out.copy_(backend.attend_turned(x.clone(), cache, turn, step, scale=dim**-0.5))
        for _ in range(20):
            pool.copy_(start)
            out.zero_()
            graph.replay()
            assert torch.equal(out, got)


@pytest.mark.parametrize("shape_name", ["32/8x128", "16/8x64", "8/1x80", "16/4x256", "71/1x64", "mla16"])
def test_common_beginnings_are_read_once(shape_name: str) -> None:
    """As without saying so, for more sequences than a group holds, and the same bits each time."""
    heads, shape = SHAPES[shape_name]
    generator = torch.Generator(GPU).manual_seed(1)
    common, own = [range(64), range(64, 66)], iter(range(66, 2000))
    rows, lengths, tables = [list(range(40)), list(range(40, 46))], [], []
    for row in range(50):
        mine = list(common[0] if row < 40 else common[1] if row < 46 else [])
        lengths.append(64 * len(mine) + 1 + 37 * row % 200)
        tables.append([*mine, *(next(own) for _ in range(-(-lengths[-1] // 64) - len(mine)))])
    step = ragged([n - 1 for n in lengths], [1] * 50, tables, 64, GPU)
    members = torch.full((12, 16), -1, dtype=torch.int32)
    pages, num_pages = torch.zeros(12, dtype=torch.int32), torch.zeros(50, dtype=torch.int32)
    parts = [(rows[0][i : i + 16], 64) for i in (0, 16, 32)] + [(rows[1], 2)]
    for i, (some, count) in enumerate(parts):
        members[i, : len(some)], pages[i] = torch.tensor(some), count
        num_pages[some] = count
    shared = dataclasses.replace(step, shared=Shared(members.to(GPU), pages.to(GPU), num_pages.to(GPU)))
    numbers = torch.randn(next(own), shape.num_bytes(64, 2) // 2, generator=generator, device=GPU)
    pool = numbers.bfloat16().view(torch.uint8)
    q = torch.randn(50, heads, shape.k_dim, generator=generator, device=GPU).bfloat16()
    for feature in ("plain", "softcap", "sinks"):
        chosen = {**options(feature, heads), "scale": shape.k_dim**-0.5}
        backend = Triton(64)
        cache = backend.views(pool, 0, shape, torch.bfloat16)
        want = backend.attend(q, cache, step, **chosen).float()
        got = backend.attend(q, cache, shared, **chosen)
        assert (got.float() - want).norm() / want.norm() <= TOLERANCE[torch.bfloat16]
        assert torch.equal(got, backend.attend(q, cache, shared, **chosen))
