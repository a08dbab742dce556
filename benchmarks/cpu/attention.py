"""Attention of one layer on a CPU, over a cache in the model's dtype and one of int8, in turn: medians.

Blocks lie at random in pools of several layers, which together do not fit into the processor's caches.
"""

import argparse
import random
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.attention.base import LayerCache, ragged
from quire.attention.cpu import Cpu
from quire.attention.shapes import CacheShape

POOL_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    num_heads: int
    shape: CacheShape


CASES = (
    Case("16 heads of 128, 8 of keys", 16, CacheShape(8, 128, 128)),
    Case("32 heads of 64, 8 of keys", 32, CacheShape(8, 64, 64)),
    Case("32 heads of 128, 8 of keys", 32, CacheShape(8, 128, 128)),
)


class Contestant:
    """A sequence of `length` tokens in every layer of a pool, the last `count` of which are attended."""

    def __init__(self, case: Case, dtype: torch.dtype, quantized: bool, length: int, count: int):
        self.backend = Cpu(quantized=quantized)
        size = self.backend.block_size
        share, num_blocks = case.shape.num_bytes(size, dtype.itemsize, quantized), -(-length // size)
        num_layers = max(2, POOL_BYTES // (share * num_blocks))
        pool = torch.zeros(num_blocks, share * num_layers, dtype=torch.uint8)
        self.caches: list[LayerCache] = [
            self.backend.views(pool, i * share, case.shape, dtype) for i in range(num_layers)
        ]
        table = random.Random(0).sample(range(num_blocks), num_blocks)
        whole = ragged([0], [length], [table], size)
        for cache in self.caches:
            k, v = (torch.randn(length, case.shape.num_kv_heads, case.shape.k_dim).to(dtype) for _ in "kv")
            self.backend.write(cache, k, v, whole)
        self.table, self.size, self.first, self.count = table, size, length - count, count

    def layer_us(self, q: Tensor) -> float:
        """Microseconds of a layer."""
        step = ragged([self.first], [self.count], [self.table], self.size)
        start = time.perf_counter()
        for cache in self.caches:
            self.backend.attend(q, cache, step, scale=0.1)
        return (time.perf_counter() - start) / len(self.caches) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=4096, help="tokens of the sequence")
    parser.add_argument("--count", type=int, default=1, help="of them attended: 1 is decode")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| | dtype | auto, us | int8, us | ratio |\n|---|---|---|---|---|")
    for case in CASES:
        for dtype in (torch.bfloat16, torch.float32):
            pair = [Contestant(case, dtype, q, args.length, args.count) for q in (False, True)]
            q = torch.randn(args.count, case.num_heads, case.shape.k_dim).to(dtype)
            rounds = [[one.layer_us(q) for one in pair] for _ in range(args.rounds)]
            plain, small = (statistics.median(times) for times in zip(*rounds, strict=True))
            name = str(dtype).removeprefix("torch.")
            print(f"| {case.name} | {name} | {plain:.0f} | {small:.0f} | {plain / small:.2f} |", flush=True)


if __name__ == "__main__":
    main()
