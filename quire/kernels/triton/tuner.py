# mypy: disable-error-code="no-untyped-def"
"""How fast products of few rows are here, and which tiles are the fastest. Prints nothing.

A time is that of a CUDA graph of several products, each with a weight of its own, so that none is left in the second-
level cache; divided by their number; the median of a few replays. Ends and beginnings overlap, as in a network.
"""

import functools
import itertools
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.gpu import Gpu, gpu_of
from quire.kernels.reference import RmsNorm, RowScale
from quire.kernels.triton.described import compile_only
from quire.kernels.triton.machine import machine
from quire.kernels.triton.products import Into, StreamedWeight, multiply, pack_linear_triton
from quire.kernels.triton.tiles import Product, Tile, bucket, fitted, rule, tile_for

ROTATED_BYTES = 300e6  # several times the second-level cache
MOST_WEIGHTS = 32
REPLAYS = 7
MAX_PROCESSES = 16
READ_NUMBERS, READ_AT_ONCE = 2**29, 4096
ONE_ROW = (
    (4, 1024, 1),
    (4, 1024, 4),
    (8, 512, 4),
    (2, 1024, 1),
    (2, 1024, 4),
    (8, 256, 4),
)  # rows, step, unrolled
SHORT = ((16, 128, 6, 1), (16, 256, 4, 1), (16, 256, 3, 1), (32, 128, 5, 2))  # rows, step, stages, warps
TALL = ((64, 128, 4, 4), (64, 128, 3, 4), (64, 256, 3, 4), (64, 64, 5, 4), (128, 128, 3, 8), (128, 64, 4, 8))


@dataclass(frozen=True, slots=True)
class Case:
    """A product as a network has it."""

    name: str
    outputs: int
    inputs: int
    kind: str  # plain | normed (its input) | gated | added | logits

    def product(self, num_rows: int, dtype: torch.dtype) -> Product:
        return Product(self.outputs, self.inputs, bucket(num_rows), self.kind == "gated", dtype.itemsize)

    @property
    def num_weights(self) -> int:
        return self.outputs * self.inputs * (1 + (self.kind == "gated"))


class Candidates(Protocol):
    """What is going to be timed."""

    def launches(self) -> Iterator[Callable[[], object]]:
        """One launch with each tile worth a try."""
        ...


class Bench:
    """A case's tensors for a number of rows, and times of its product."""

    def __init__(self, case: Case, num_rows: int, dtype: torch.dtype, device: torch.device):
        self.case, self.num_rows, self.dtype = case, num_rows, dtype
        count = int(ROTATED_BYTES / (case.num_weights * dtype.itemsize)) + 1
        self.weights: list[StreamedWeight] = []
        for _ in range(max(2, min(MOST_WEIGHTS, count))):
            weight = torch.empty(case.num_weights // case.inputs, case.inputs, dtype=dtype, device=device)
            packed = pack_linear_triton(weight.normal_(0, case.inputs**-0.5))
            if isinstance(packed, StreamedWeight):
                self.weights.append(packed)
        self.x = torch.randn(num_rows, case.inputs, device=device).to(dtype)
        self.out = torch.empty(
            (num_rows, case.outputs), device=device, dtype=torch.float32 if case.kind == "logits" else dtype
        )
        self.scale = RowScale(torch.ones(num_rows, case.inputs // 16, device=device), 1e-6)
        residual = torch.zeros(num_rows, case.outputs, device=device)
        gain = torch.ones(case.outputs, device=device, dtype=dtype)
        self.into = Into(residual, torch.empty_like(residual), RmsNorm(gain, 1e-6))
        self.product = case.product(num_rows, dtype)

    def run(self, tile: Tile | None, weight: StreamedWeight) -> object:
        """Our product, with what surrounds it in a network."""
        kind = self.case.kind
        return multiply(
            self.x,
            weight,
            self.out,
            scale=self.scale if kind in ("normed", "gated") else None,
            act="silu" if kind == "gated" else "",
            into=self.into if kind == "added" else None,
            tile=tile,
        )

    def ours(self, tile: Tile | None = None) -> float:
        """Seconds of `run`."""
        return self._seconds(functools.partial(self.run, tile))

    def cublas(self) -> float:
        """Seconds of cuBLAS's product, with nothing around it."""
        return self._seconds(lambda weight: torch.mm(self.x, weight.data.t()))

    def best(self) -> tuple[Tile, float, float]:
        """(the fastest tile, its seconds, those of the tile in use until now)."""
        used = tile_for(self.product, *machine(self.x.device)[:2])
        times = {tile: self.ours(tile) for tile in self.candidates()}
        fastest = min(times, key=lambda tile: times[tile])
        return fastest, times[fastest], times[used]

    def launches(self) -> Iterator[Callable[[], object]]:
        return (functools.partial(self.run, tile, self.weights[0]) for tile in self.candidates())

    def candidates(self) -> Iterator[Tile]:
        processors, shared_bytes, _ = machine(self.x.device)
        return candidates(self.product, processors, shared_bytes)

    def _seconds(self, run: Callable[[StreamedWeight], object]) -> float:
        return seconds([functools.partial(run, weight) for weight in self.weights]) / len(self.weights)


def compile_all(benches: Sequence[Callable[[torch.device], Candidates]]) -> None:
    """What will be timed, in processes: to compile it is minutes' work for one. `benches` make one on a device."""
    gpu, count = gpu_of(torch.device("cuda")), min(len(os.sched_getaffinity(0)), MAX_PROCESSES)
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        shares = [pool.submit(_compile_share, gpu, benches, i, count) for i in range(count)]
    for share in shares:
        share.result()


def _compile_share(
    gpu: Gpu | None, benches: Sequence[Callable[[torch.device], Candidates]], first: int, step: int
) -> None:
    if gpu is not None:
        compile_only(gpu)
    made = [bench(torch.device("meta")) for bench in benches]
    for run in list(itertools.chain.from_iterable(bench.launches() for bench in made))[first::step]:
        run()


def candidates(product: Product, processors: int, shared_bytes: int) -> Iterator[Tile]:
    """Tiles worth a try, each once: the one in use, the rule's, and the shapes that ever won."""
    tried = [tile_for(product, processors, shared_bytes), rule(product, processors)]
    if product.rows == 1:
        tried += [Tile(rows, step, 1, unrolled, 4) for rows, step, unrolled in ONE_ROW]
    else:
        shapes = SHORT + TALL[:3] if product.rows == 8 else TALL
        for (rows, step, stages, warps), split in itertools.product(shapes, (1, 2, 4, 8)):
            programs = -(-product.outputs // rows) * split
            if split == 1 or (programs <= 8 * processors and product.inputs >= 2 * split * step):
                tried.append(Tile(rows, step * 2 // product.itemsize, split, stages, warps))
    yield from dict.fromkeys(fitted(tile, product, shared_bytes) for tile in tried)


def seconds(runs: Sequence[Callable[[], object]]) -> float:
    """One after the other, from a graph."""
    runs[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


@triton.jit
def _read(x, out, COUNT: tl.constexpr):
    at = x + tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    tl.store(out + tl.program_id(0), tl.sum(tl.load(at, eviction_policy="evict_first").to(tl.float32), 0))


def read_bytes_per_s() -> float:
    """What the GPU's memory gives, by reading 1 GiB."""
    x = torch.zeros(READ_NUMBERS, dtype=torch.bfloat16, device="cuda")
    out = torch.empty(READ_NUMBERS // READ_AT_ONCE, device="cuda")

    def read() -> Tensor:
        _read[(len(out),)](x, out, COUNT=READ_AT_ONCE, num_warps=4)
        return out

    return x.nbytes / seconds([read])
