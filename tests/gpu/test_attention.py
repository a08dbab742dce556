"""The Triton backend at real sizes against the reference: every head size, feature and kind of step.

Keys and values are written by the backend into a pool full of NaN; both layouts are the same where head dimensions
are multiples of 16, so the reference reads what the backend wrote.
"""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from quire.attention.base import LayerCache, Ragged, ragged
from quire.attention.reference import Reference
from quire.attention.shapes import CacheShape
from quire.attention.triton.backend import Triton

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


def setup(shape_name: str, dtype: torch.dtype, chunks: list[tuple[int, int]], block_size: int = 64) -> Setup:
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
    step = ragged([a for a, _ in chunks], [b for _, b in chunks], tables, block_size, GPU)
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
