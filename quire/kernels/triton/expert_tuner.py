"""How fast layers of sparse experts are here, and which tiles are the fastest; as tuner.py. Prints nothing.

Tokens go to experts at random, to others in each run of a graph, so that weights come from memory as in a network.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from quire.kernels.experts import Experts, Routes, Rule, route
from quire.kernels.reference import RmsNorm, RowScale
from quire.kernels.triton.expert_tiles import expert_rule, expert_tile_for, rows_for
from quire.kernels.triton.mixture import arrange, mix, multiply_down, multiply_down_alone, multiply_up
from quire.kernels.triton.products import Into, machine
from quire.kernels.triton.tiles import Product, Tile, fitted
from quire.kernels.triton.tuner import SHORT, TALL, seconds

RUNS = 8  # in a graph, each with routes of its own
PARTS = 32  # sums of squares of a row
ALONE = tuple(itertools.product((1, 2, 4, 8), (512, 1024), (1, 2, 4)))  # rows, step, unrolled
HIGH = ((128, 64, 3, 8), (128, 64, 4, 8), (128, 128, 2, 8), (64, 64, 4, 4), (64, 64, 3, 8), (256, 64, 3, 8))


@dataclass(frozen=True, slots=True)
class Mixture:
    """A layer's experts, with gates."""

    dim: int
    hidden: int
    num_experts: int
    top_k: int


class ExpertBench:
    """A layer's tensors for a number of tokens, and times of its products."""

    def __init__(self, mixture: Mixture, num_tokens: int, dtype: torch.dtype):
        device, m = torch.device("cuda", torch.cuda.current_device()), mixture
        self.mixture, self.num_tokens, self.dtype = m, num_tokens, dtype

        def draw(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(0, shape[-1] ** -0.5)

        up, down = draw(m.num_experts, 2 * m.hidden, m.dim), draw(m.num_experts, m.dim, m.hidden)
        self.stack = Experts(up, down, None, None, "silu", True)
        self.routes: list[Routes] = []
        for _ in range(RUNS):
            scores = torch.randn(num_tokens, m.num_experts, device=device)
            self.routes.append(route(scores, Rule(m.top_k), None))
        self.x = torch.randn(num_tokens, m.dim, device=device).to(dtype)
        self.scale = RowScale(torch.ones(num_tokens, PARTS, device=device), 1e-6)
        residual = torch.zeros(num_tokens, m.dim, device=device)
        self.into = Into(residual, torch.empty_like(residual), RmsNorm(draw(m.dim), 1e-6))
        self.rows = rows_for(num_tokens, m.top_k, m.num_experts, dtype.itemsize)
        self.up = Product(m.hidden, m.dim, self.rows, True, dtype.itemsize)
        self.down = Product(m.dim, m.hidden, self.rows, False, dtype.itemsize)

    def whole(self) -> float:
        """Seconds of the experts of a layer, from routes to the sum and its norm."""
        runs = [
            functools.partial(mix, self.x, self.scale, routes, self.stack, None, self.into)
            for routes in self.routes
        ]
        return seconds(runs) / RUNS

    def touched_bytes(self) -> float:
        """Of the weights that one run needs."""
        m = self.mixture
        num_met = sum(len(routes.experts.unique()) for routes in self.routes) / RUNS
        return num_met * 3 * m.dim * m.hidden * self.dtype.itemsize

    def products(self) -> Iterator[tuple[str, Product, Callable[[Tile], float]]]:
        """(name, key of the table, seconds with a tile) of each."""
        yield "up", self.up, self._up
        yield "down", self.down, self._down

    def best(self, product: Product, time: Callable[[Tile], float]) -> tuple[Tile, float, float]:
        """(the fastest tile, its seconds, those of the tile in use until now)."""
        processors, shared_bytes, _ = machine(self.x.device)
        used = expert_tile_for(product, processors, shared_bytes)
        times = {tile: time(tile) for tile in expert_candidates(product, processors, shared_bytes)}
        fastest = min(times, key=lambda tile: times[tile])
        return fastest, times[fastest], times[used]

    def _up(self, tile: Tile) -> float:
        runs = []
        for routes in self.routes:
            arranged = None if self.rows == 1 else arrange(routes, self.mixture.num_experts, self.rows)
            given = (self.x, self.scale, routes, self.stack, arranged, tile)
            runs.append(functools.partial(multiply_up, *given))
        return seconds(runs) / RUNS

    def _down(self, tile: Tile) -> float:
        num_pairs = self.num_tokens * self.mixture.top_k
        hidden = torch.randn(num_pairs, self.mixture.hidden, device=self.x.device).to(self.dtype)
        runs: list[Callable[[], object]] = []
        for routes in self.routes:
            if self.rows == 1:
                given = (hidden, routes, self.stack, None, self.into, tile)
                runs.append(functools.partial(multiply_down_alone, *given))
            else:
                arranged = arrange(routes, self.mixture.num_experts, self.rows)
                runs.append(functools.partial(multiply_down, hidden, routes, self.stack, arranged, tile))
        return seconds(runs) / RUNS


def expert_candidates(product: Product, processors: int, shared_bytes: int) -> Iterator[Tile]:
    """Tiles worth a try, each once: the one in use, the rule's, and the shapes that won for dense layers."""
    tried = [expert_tile_for(product, processors, shared_bytes), expert_rule(product, processors)]
    if product.rows == 1:
        tried += [Tile(rows, step, 1, unrolled, 4) for rows, step, unrolled in ALONE]
    else:
        shapes = SHORT + TALL[:3] if product.rows == 8 else TALL if product.rows < 128 else HIGH
        for rows, step, stages, warps in shapes:
            tile = Tile(rows, step * 2 // product.itemsize, 1, stages, warps)
            if _fits(tile, product):
                tried.append(tile)
    yield from dict.fromkeys(fitted(tile, product, shared_bytes) for tile in tried)


def _fits(tile: Tile, product: Product) -> bool:
    """Whether its sums leave room for anything else in the registers of its threads."""
    sums = tile.rows * max(product.rows, 16) * (1 + product.gated)
    return sums <= 128 * 32 * tile.warps
