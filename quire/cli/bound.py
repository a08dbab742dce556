"""How fast a workload could run here at best: what the machine reads and multiplies, what the network needs.

Every decode step must read the weights and the KV of all its sequences; every token must be multiplied with
every weight it meets. A step takes the longer of the two times at least, with as many sequences at once as
the workload has. Speculation and quantization would change what the network needs.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Self

import torch

from quire.config import Config
from quire.engine.device import mesh_of
from quire.models.parameters import block_shapes, index_values, kv_values_read, shared_shapes
from quire.models.spec import MLA, Block, Decoder, MoE, attention_of

READ_BYTES = 2**30  # larger than the caches of any machine that runs models
ROUNDS = 8


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What one device was measured to do at best."""

    bytes_per_s: float
    flops_per_s: float

    def best_of(self, other: "Speed") -> "Speed":
        """Speeds come and go with a machine's other users; a bound takes the best that was seen."""
        return Speed(
            bytes_per_s=max(self.bytes_per_s, other.bytes_per_s),
            flops_per_s=max(self.flops_per_s, other.flops_per_s),
        )

    def times(self, count: int) -> "Speed":
        """Of so many devices together."""
        return Speed(bytes_per_s=count * self.bytes_per_s, flops_per_s=count * self.flops_per_s)


def measure_ranks(config: Config) -> Speed:
    """Measure one device of an engine whose options are resolved, all of whose devices are taken to be as fast."""
    own = torch.get_num_threads()  # where ranks share a CPU, this one's
    torch.set_num_threads(config.num_threads or own)
    try:
        return measure(torch.device(config.device), getattr(torch, config.dtype)).times(num_devices(config))
    finally:
        torch.set_num_threads(own)


def num_devices(config: Config) -> int:
    """GPUs, of which each rank has one, or machines, whose CPU's threads ranks share."""
    return config.nnodes if config.device == "cpu" else mesh_of(config).size


def measure(device: torch.device, dtype: torch.dtype) -> Speed:
    """Read a buffer, and multiply square matrices of `dtype`: the best of a few rounds each."""
    buffer = torch.ones(READ_BYTES // 4, device=device)
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    return Speed(
        bytes_per_s=READ_BYTES
        / min(_seconds(lambda: torch.dot(buffer, buffer), device) for _ in range(ROUNDS)),
        flops_per_s=2 * size**3 / min(_seconds(lambda: a @ a, device) for _ in range(ROUNDS)),
    )


def _seconds(run: Callable[[], torch.Tensor], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer needs, in elements of its parameters, of the cache, and in multiplications."""

    always: int  # parameters that every token meets
    expert: int  # parameters of one expert
    num_experts: int
    top_k: int
    cached: int  # numbers that it reads of a position in the cache
    pair_flops: int  # of a token with one position it looks at
    window: int | None
    index: int = 0  # numbers that it reads of every position, to choose those that it looks at

    @classmethod
    def of(cls, block: Block, dim: int) -> Self:
        always = experts = 0
        for name, shape in (*block_shapes(block, dim), *shared_shapes(block.mixer, dim)):
            if name.startswith("mlp.experts."):
                experts += prod(shape)
            else:
                always += prod(shape)
        num_experts, top_k = (
            (block.mlp.num_experts, block.mlp.top_k) if isinstance(block.mlp, MoE) else (0, 0)
        )
        mixer = attention_of(block.mixer)
        pair_dims, window = 0, None
        if isinstance(mixer, MLA):
            pair_dims = mixer.num_heads * (mixer.nope_dim + mixer.rope_dim + mixer.v_dim)
            window = mixer.indexer.top_k if mixer.indexer else None
        elif mixer is not None:
            pair_dims, window = mixer.num_heads * (mixer.head_dim + mixer.value_dim), mixer.window
        return cls(
            always=always,
            expert=experts // max(num_experts, 1),
            num_experts=num_experts,
            top_k=top_k,
            cached=kv_values_read(block),
            pair_flops=2 * pair_dims,
            window=window,
            index=index_values(block),
        )

    def met(self, num_tokens: int) -> float:
        """Experts that at least one of these tokens meets, if all are as likely."""
        share = self.top_k / max(self.num_experts, 1)
        return self.num_experts * (1 - (1 - share) ** num_tokens)

    def seen(self, length: int) -> int:
        """Positions that the last of `length` tokens looks at."""
        return length if self.window is None else min(length, self.window)

    def pairs(self, length: int) -> float:
        """Tokens of a prompt with the positions they look at."""
        seen = self.seen(length)
        return seen * (seen + 1) / 2 + (length - seen) * seen


class Needs:
    """What a network needs; `itemsize` are the bytes of a weight and of a number in the cache."""

    def __init__(self, spec: Decoder, itemsize: int):
        self.itemsize = itemsize
        self.head = spec.dim * spec.vocab_size
        self.layers = [Layer.of(block, spec.dim) for block in spec.blocks]
        self.cached: Counter[int | None] = Counter()  # by window, because a sum over layers would be slow
        for layer in self.layers:
            self.cached[layer.window] += layer.cached
            self.cached[None] += layer.index

    def weight_bytes(self, num_tokens: int) -> float:
        """Weights that a step over this many tokens reads."""
        return self.itemsize * (self.head + sum(k.always + k.expert * k.met(num_tokens) for k in self.layers))

    def cache_bytes(self, length: int) -> int:
        """What the last of `length` tokens reads."""
        cached = self.cached.items()
        return self.itemsize * sum(k * (length if w is None else min(length, w)) for w, k in cached)

    def flops(self, num_tokens: int, num_logits: int) -> float:
        """Multiplications and additions with weights, where this many of the tokens are given logits."""
        weights = sum(k.always + k.expert * k.top_k for k in self.layers)
        return 2 * (weights * num_tokens + self.head * num_logits)

    def attention_flops(self, length: int) -> float:
        """Of a whole prompt: each token with those before it."""
        return sum(k.pair_flops * k.pairs(length) for k in self.layers)


def bound_s(
    speed: Speed, needs: Needs, input_lens: Sequence[int], output_lens: Sequence[int], n: int = 1
) -> float:
    """Seconds this takes at least: all prompts are read, then all decode together, `n` times each."""
    flops = needs.flops(sum(input_lens), len(input_lens)) + sum(needs.attention_flops(k) for k in input_lens)
    total = max(flops / speed.flops_per_s, needs.weight_bytes(sum(input_lens)) / speed.bytes_per_s)
    for step in range(1, max(output_lens)):  # the prompt's step gave the first token
        lengths = [i + step for i, o in zip(input_lens, output_lens, strict=True) if o > step]
        rows = n * len(lengths)
        num_bytes = needs.weight_bytes(rows) + n * sum(map(needs.cache_bytes, lengths))
        total += max(num_bytes / speed.bytes_per_s, needs.flops(rows, rows) / speed.flops_per_s)
    return total
