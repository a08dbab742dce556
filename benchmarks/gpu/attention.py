"""Attention on a GPU: time of a layer, and the shares of memory bandwidth and of arithmetic that it reaches.

    python benchmarks/gpu/attention.py [decode|prefill|wide]

Each time is that of a CUDA graph of several layers, whose caches together do not fit in the second-level cache, divided
by their number; the median of a few replays. Numbers are random, in bfloat16.
"""

import dataclasses
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from quire.attention.base import ragged  # noqa: E402
from quire.attention.shapes import CacheShape  # noqa: E402
from quire.attention.triton.backend import Triton  # noqa: E402

BYTES_PER_S = 3.08e12  # what an H100 reads, measured
FLOPS_PER_S = 989e12  # what it computes in bfloat16, published
LAYERS, MOST_LAYERS = 4, 32
CACHE_BYTES = 300e6  # several times the second-level cache
REPLAYS = 7
GPU = torch.device("cuda")
GQA = (32, CacheShape(8, 128, 128))
MLA = (128, CacheShape(1, 576, 512, v_in_k=True))
Chunks = Sequence[tuple[int, int]]  # (positions before, positions of this step) of each sequence


def measure(layer: Callable[[int], object], num_layers: int) -> float:
    """Seconds of one layer."""
    for i in range(num_layers):
        layer(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(num_layers):
            layer(i)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / num_layers)
    return statistics.median(times)


def seconds(
    chunks: Chunks, heads: int, shape: CacheShape, *, described: bool = True, **options: bool
) -> float:
    """One layer of a step, without writing its keys and values."""
    backend = Triton(**options)
    size, lengths = backend.block_size, [a + b for a, b in chunks]
    needed = [-(-n // size) for n in lengths]
    share = shape.num_bytes(size, 2)
    num_layers = min(MOST_LAYERS, max(LAYERS, int(CACHE_BYTES / (sum(needed) * share))))
    pool = torch.empty(sum(needed), share * num_layers, dtype=torch.uint8, device=GPU)
    pool.view(torch.bfloat16).normal_()
    blocks = random.Random(0).sample(range(sum(needed)), sum(needed))
    tables = [[blocks.pop() for _ in range(n)] for n in needed]
    step = ragged([a for a, _ in chunks], [b for _, b in chunks], tables, size, GPU)
    caches = [backend.views(pool, i * share, shape, torch.bfloat16) for i in range(num_layers)]
    if not described:
        caches = [
            dataclasses.replace(c, handle=dataclasses.replace(c.handle, described=(None, None)))
            for c in caches
        ]
    q = torch.randn(sum(b for _, b in chunks), heads, shape.k_dim, device=GPU, dtype=torch.bfloat16)
    scale = shape.k_dim**-0.5
    return measure(lambda i: backend.attend(q, caches[i], step, scale=scale), num_layers)


def cache_bytes(chunks: Chunks, shape: CacheShape) -> int:
    return sum(a + b for a, b in chunks) * shape.num_bytes(64, 2) // 64


def flops(chunks: Chunks, heads: int, shape: CacheShape) -> int:
    seen = sum(b * a + b * (b + 1) // 2 for a, b in chunks)
    return 2 * heads * (shape.k_dim + shape.v_dim) * seen


def decodes(*lengths: int) -> Chunks:
    return [(n - 1, 1) for n in lengths]


def some(count: int, most: int) -> Chunks:
    chance = random.Random(count)
    return decodes(*(chance.randint(64, most) for _ in range(count)))


DECODE: dict[str, Chunks] = {
    **{
        f"b{b} {n}": decodes(*[n] * b) for b in (1, 8, 64, 256) for n in (190, 1024, 4096) if b * n <= 300_000
    },
    "b1 16384": decodes(16384),
    "b1 131072": decodes(131072),
    "b8 16384": decodes(*[16384] * 8),
    "1 x 16k + 63 x 1k": decodes(16384, *[1024] * 63),
    "1 x 128k + 31 x 4k": decodes(131072, *[4096] * 31),
    "64 x 64..8k": some(64, 8192),
    "256 x 64..2k": some(256, 2048),
}
PREFILL: dict[str, Chunks] = {
    "1 x 512": [(0, 512)],
    "1 x 2k": [(0, 2048)],
    "4 x 2k": [(0, 2048)] * 4,
    "8 x 2k": [(0, 2048)] * 8,
    "16 x 512": [(0, 512)] * 16,
    "1 x 8k": [(0, 8192)],
    "1 x 16k": [(0, 16384)],
    "2k after 14k": [(14336, 2048)],
    "2k, 64 decodes of 1k": [(0, 2048), *decodes(*[1024] * 64)],
}


def row(name: str, find: Callable[[], str]) -> None:
    """One line; what fails is named, and the others go on."""
    try:
        found = find()
    except Exception as error:
        found = f"{type(error).__name__}: {str(error)[-160:]}".replace("\n", " ")
    print(f"{name:24} {found}", flush=True)
    torch.cuda.empty_cache()


def decode_row(chunks: Chunks, heads: int, shape: CacheShape, **options: bool) -> str:
    time, read = seconds(chunks, heads, shape, **options), cache_bytes(chunks, shape)
    return f"{time * 1e6:8.1f} us {read / time / 1e12:6.2f} TB/s {read / time / BYTES_PER_S:6.0%}"


def prefill_row(chunks: Chunks, heads: int, shape: CacheShape, **options: bool) -> str:
    time, work = seconds(chunks, heads, shape, **options), flops(chunks, heads, shape)
    return f"{time * 1e6:8.1f} us {work / time / 1e12:6.0f} TFLOP/s {work / time / FLOPS_PER_S:6.0%}"


def main(chosen: Sequence[str]) -> None:
    if "decode" in chosen:
        print("decode, 32/8 heads of 128: time, cache read per second, share of what the GPU reads")
        for name, chunks in DECODE.items():
            row(name, lambda chunks=chunks: decode_row(chunks, *GQA))
        row("b64 1024, invariant", lambda: decode_row(decodes(*[1024] * 64), *GQA, invariant=True))
    if "prefill" in chosen:
        print("causal prefill, 32/8 heads of 128: time, products per second, share of what the GPU computes")
        for name, chunks in PREFILL.items():
            row(name, lambda chunks=chunks: prefill_row(chunks, *GQA))
        for name in ("4 x 2k", "1 x 8k"):
            row(
                f"{name}, no descriptors", lambda name=name: prefill_row(PREFILL[name], *GQA, described=False)
            )
    if "wide" in chosen:
        print("latent attention, 128 heads of 576 and 512, and 16/8 heads of 256")
        for name in ("b1 4096", "b64 1024"):
            row(f"latent, {name}", lambda name=name: decode_row(DECODE[name], *MLA))
            row(f"256, {name}", lambda name=name: decode_row(DECODE[name], 16, CacheShape(8, 256, 256)))
        row("latent, 1 x 2k", lambda: prefill_row(PREFILL["1 x 2k"], *MLA))
        row("256, 4 x 2k", lambda: prefill_row(PREFILL["4 x 2k"], 16, CacheShape(8, 256, 256)))


if __name__ == "__main__":
    main(sys.argv[1:] or ("decode", "prefill", "wide"))
