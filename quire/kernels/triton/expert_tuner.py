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
# Rows, step, unrolled, warps.
ALONE = tuple(itertools.product((1, 2, 4, 8, 16), (256, 512, 1024), (1, 2, 4), (2, 4)))
LEAST, MOST = 1024, 8192  # numbers of a weight that a program takes at once
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

    def __init__(self, mixture: Mixture, num_tokens: int, dtype: torch.dtype, device: torch.device):
        m = mixture
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
        self.hidden = torch.randn(num_tokens * m.top_k, m.hidden, device=device).to(dtype)
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

    def products(self) -> tuple[Product, Product]:
        """Keys of the table: up, down."""
        return self.up, self.down

    def best(self, product: Product) -> tuple[Tile, float, float]:
        """(the fastest tile, its seconds, those of the tile in use until now)."""
        processors, shared_bytes, _ = machine(self.x.device)
        used = expert_tile_for(product, processors, shared_bytes)
        times = {
            tile: seconds([self._run(product, tile, routes) for routes in self.routes]) / RUNS
            for tile in expert_candidates(product, processors, shared_bytes)
        }
        fastest = min(times, key=lambda tile: times[tile])
        return fastest, times[fastest], times[used]

    def launches(self) -> Iterator[Callable[[], object]]:
        for product in self.products():
            for tile in expert_candidates(product, *machine(self.x.device)[:2]):
                yield self._run(product, tile, self.routes[0])

    def _run(self, product: Product, tile: Tile, routes: Routes) -> Callable[[], object]:
        arranged = None if self.rows == 1 else arrange(routes, self.mixture.num_experts, self.rows)
        if product == self.up:
            return functools.partial(multiply_up, self.x, self.scale, routes, self.stack, arranged, tile)
        if arranged is None:
            return functools.partial(
                multiply_down_alone, self.hidden, routes, self.stack, None, self.into, tile
            )
        return functools.partial(multiply_down, self.hidden, routes, self.stack, arranged, tile)


def expert_candidates(product: Product, processors: int, shared_bytes: int) -> Iterator[Tile]:
    """Tiles worth a try, each once: the one in use, the rule's, and the shapes that won for dense layers."""
    tried = [expert_tile_for(product, processors, shared_bytes), expert_rule(product, processors)]
    if product.rows == 1:
        tried += [
            Tile(rows, step, 1, unrolled, warps)
            for rows, step, unrolled, warps in ALONE
            if product.inputs % step == 0 and LEAST <= rows * step <= MOST
        ]
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
