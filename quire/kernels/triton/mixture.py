"""Sparse experts on NVIDIA GPUs: which kernels, with which tiles. Registered beside their references.

What runs and in which memory follows from sizes alone, never from where tokens go: the host need not know, and a CUDA
graph holds for any routing. Results differ from the reference's by what it would have rounded in between, and by the
order of a token's experts, which is that of its choices here.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quire.kernels.experts import (
    PLAIN_ONLY,
    Experts,
    Routes,
    Rule,
    Shared,
    experts,
    experts_add_norm,
    pack_experts,
    route,
)
from quire.kernels.reference import RmsNorm, RowScale, act_mul_within, pack_linear
from quire.kernels.triton import experts as kernels
from quire.kernels.triton import routing
from quire.kernels.triton.expert_tiles import expert_tile_for, rows_for, turns_for
from quire.kernels.triton.linear import AFTER, EARLY, LATE
from quire.kernels.triton.machine import following, machine
from quire.kernels.triton.ops import ACTIVATIONS, DTYPES, MOST_COLUMNS, add_norm_triton, power_of_two
from quire.kernels.triton.products import SUMMED, UNSCALED, Into
from quire.kernels.triton.tiles import Product, Tile

MOST_EXPERTS = 1024  # that a program chooses from; torch chooses from more
MOST_CHOICES = 32  # of a token, each of which makes kernels longer
PAIRS_AT_ONCE = 4096  # that a program arranges
INVARIANT_ROWS = 16  # of tiles that may not depend on how many tokens there are


class Arranged(NamedTuple):
    """Pairs by expert; see routing.py."""

    order: Tensor  # [T * top_k] int32
    slots: Tensor  # [3, T * top_k // rows + E] int32
    rows: int  # of a slot


@route.on("cuda", torch.float32)
def route_triton(logits: Tensor, rule: Rule, correction: Tensor | None) -> Routes:
    num_tokens, count = logits.shape
    if rule.score in PLAIN_ONLY or count > MOST_EXPERTS or rule.top_k > MOST_CHOICES or not num_tokens:
        return route.reference(logits, rule, correction)
    logits = logits.contiguous()
    chosen = torch.empty(num_tokens, rule.top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(chosen.shape, dtype=torch.float32, device=logits.device)
    routing.route[(num_tokens,)](
        *(logits, correction, chosen, weights, rule.scale),
        NUM=count,
        TOP_K=rule.top_k,
        WIDTH=power_of_two(rule.top_k),
        GROUPS=rule.groups,
        TOP_GROUPS=rule.top_groups,
        ROWS=power_of_two(rule.groups),
        COLUMNS=power_of_two(count // rule.groups),
        SCORE=rule.score,
        RENORM=rule.renorm,
        num_warps=1 if count <= 512 else 4,
        **following(logits.device, AFTER),
    )
    return Routes(chosen, weights)


@pack_experts.on("cuda", *DTYPES)
def pack_experts_triton(
    first: Tensor, others: Iterable[Tensor], count: int, pack: Callable[[Tensor], Any] = pack_linear
) -> Tensor:
    """One tensor [count, outputs, inputs], since a kernel takes all experts at once."""
    stacked = first.new_empty(count, *first.shape)
    stacked[0] = first
    for i, weight in enumerate(others, 1):
        stacked[i] = weight
    return stacked


@experts.on("cuda", *DTYPES)
def experts_triton(
    values: Tensor, scale: RowScale | None, routes: Routes, stack: Experts, shared: Shared | None
) -> Tensor:
    return mix(values, scale, routes, stack, shared)[0]


@experts_add_norm.on("cuda", *DTYPES)
def experts_add_norm_triton(
    values: Tensor,
    scale: RowScale | None,
    routes: Routes,
    stack: Experts,
    shared: Shared | None,
    residual: Tensor,
    norm: RmsNorm,
) -> tuple[Tensor, Tensor, RowScale | None]:
    rows = _rows_for(values, routes, stack)
    if values.shape[1] > MOST_COLUMNS or (rows == 1 and values.dtype not in UNSCALED):
        return *add_norm_triton(mix(values, scale, routes, stack, shared)[0], residual, norm), None
    dtype = torch.float32 if rows == 1 else torch.promote_types(values.dtype, residual.dtype)
    total = torch.empty(values.shape, dtype=dtype, device=values.device)
    out, left = mix(values, scale, routes, stack, shared, Into(residual.contiguous(), total, norm))
    return total, out, left


def mix(
    values: Tensor,
    scale: RowScale | None,
    routes: Routes,
    stack: Experts,
    shared: Shared | None = None,
    into: Into | None = None,
    rows: int | None = None,
) -> tuple[Tensor, RowScale | None]:
    """(what the experts make of values [T, dim], or its sum's norm; what this has still to be multiplied by).

    `rows`: those of a tile, by `rows_for` where it is None.
    """
    if not len(values):
        return torch.empty_like(values), None
    routes = Routes(*(part.contiguous() for part in routes))
    if shared is not None:
        shared = Shared(shared.values.contiguous(), shared.gate)
    rows = rows or _rows_for(values, routes, stack)
    if rows == 1:
        hidden = multiply_up(values, scale, routes, stack, None)
        return multiply_down_alone(hidden, routes, stack, shared, into)
    arranged = arrange(routes, len(stack.up), rows)
    hidden = multiply_up(values, scale, routes, stack, arranged)
    parts = multiply_down(hidden, routes, stack, arranged)
    return combine(parts, routes, stack, shared, into), None


def arrange(routes: Routes, num_experts: int, rows: int) -> Arranged:
    """Pairs by expert, `rows` of them in a slot."""
    num_pairs, device = routes.experts.numel(), routes.experts.device
    order = torch.empty(num_pairs, dtype=torch.int32, device=device)
    slots = torch.empty(3, num_pairs // rows + num_experts, dtype=torch.int32, device=device)
    count = max(32, min(power_of_two(num_pairs), PAIRS_AT_ONCE))
    routing.arrange[(num_experts,)](
        *(routes.experts, order, slots, num_pairs, slots.shape[1]),
        ROWS=rows,
        COUNT=count,
        num_warps=min(max(count // 256, 1), 8),
        **following(device, AFTER),
    )
    return Arranged(order, slots, rows)


def multiply_up(
    x: Tensor,
    scale: RowScale | None,
    routes: Routes,
    stack: Experts,
    arranged: Arranged | None,
    tile: Tile | None = None,
) -> Tensor:
    """x [T, dim] -> [T * top_k, hidden]: activated, and in the order of `arranged`, if any."""
    if stack.limit is not None:
        plain = stack._replace(act="", gated=False, limit=None)
        both = multiply_up(x, scale, routes, plain, arranged, tile)
        return act_mul_within(both, stack.act, stack.limit)
    x = x if x.stride(1) == 1 else x.contiguous()
    (num_tokens, inputs), num_pairs = x.shape, routes.experts.numel()
    outputs, rows = stack.up.shape[1] // (1 + stack.gated), arranged.rows if arranged else 1
    out = torch.empty(num_pairs, outputs, dtype=x.dtype, device=x.device)
    num_parts = 0 if scale is None else scale.squares.shape[1]
    squares, eps = (None, 1.0) if scale is None else scale
    product = Product(outputs, inputs, rows, stack.gated, x.element_size())
    constants = {
        "ACT": ACTIVATIONS[stack.act] if stack.act else "",
        "GATED": stack.gated,
        "PARTS": min(power_of_two(num_parts), SUMMED // rows),
    }
    if arranged is not None:
        sizes = (num_tokens, x.stride(0), outputs, inputs, num_parts, eps)
        places = (x, stack.up, stack.up_bias, out, arranged.order, arranged.slots, squares)
        _together(product, arranged, places, sizes, tile, constants | {"FROM_TOKENS": True}, routes)
        return out
    tile, constants = _alone(product, x, tile, constants | {"HELD": _held(stack)}, routes)
    kernels.alone_up[(num_pairs * -(-outputs // tile.rows),)](
        *(x, stack.up, stack.up_bias, out, routes.experts, squares, x.stride(0), num_tokens, num_parts, eps),
        **constants,
    )
    return out


def multiply_down(
    hidden: Tensor, routes: Routes, stack: Experts, arranged: Arranged, tile: Tile | None = None
) -> Tensor:
    """hidden [T * top_k, hidden] in the order of `arranged` -> [T * top_k, dim], pair by pair."""
    inputs, outputs = hidden.shape[1], stack.down.shape[1]
    out = torch.empty(len(hidden), outputs, dtype=hidden.dtype, device=hidden.device)
    product = Product(outputs, inputs, arranged.rows, False, hidden.element_size())
    places = (hidden, stack.down, stack.down_bias, out, arranged.order, arranged.slots, None)
    constants = {"ACT": "", "GATED": False, "PARTS": 1, "FROM_TOKENS": False}
    sizes = (len(routes.experts), inputs, outputs, inputs, 0, 1.0)
    _together(product, arranged, places, sizes, tile, constants, routes)
    return out


def multiply_down_alone(
    hidden: Tensor,
    routes: Routes,
    stack: Experts,
    shared: Shared | None,
    into: Into | None,
    tile: Tile | None = None,
) -> tuple[Tensor, RowScale | None]:
    """hidden [T * top_k, hidden], pair by pair -> as `mix`."""
    num_tokens, (outputs, inputs) = len(routes.experts), stack.down.shape[1:]
    out = torch.empty(num_tokens, outputs, dtype=hidden.dtype, device=hidden.device)
    product = Product(outputs, inputs, 1, False, hidden.element_size())
    tile, constants = _alone(product, hidden, tile, {"HELD": _held(stack)}, routes)
    tiles, squares = -(-outputs // tile.rows), None
    if into is not None:
        squares = torch.empty(num_tokens, tiles, dtype=torch.float32, device=hidden.device)
    kernels.alone_down[(num_tokens * tiles,)](
        *(hidden, stack.down, stack.down_bias, out, *routes, *(shared or (None, None))),
        *((into.residual, into.total, into.norm.weight) if into else (None, None, None)),
        *(squares, into.norm.offset if into else 0.0),
        **constants,
    )
    return out, RowScale(squares, into.norm.eps) if into is not None and squares is not None else None


def combine(
    parts: Tensor, routes: Routes, stack: Experts, shared: Shared | None, into: Into | None
) -> Tensor:
    """parts [T * top_k, dim] -> as `mix`, its norm complete."""
    num_tokens, dim = len(routes.experts), parts.shape[1]
    out, width = parts.new_empty(num_tokens, dim), power_of_two(dim)
    kernels.combine[(num_tokens,)](
        *(parts, out, *routes, *(shared or (None, None))),
        *((into.residual, into.total, into.norm.weight) if into else (None, None, None)),
        *((into.norm.eps, into.norm.offset) if into else (1.0, 0.0)),
        into.residual.stride(0) if into else 0,
        TOP_K=routes.experts.shape[1],
        SIZE=dim,
        WIDTH=width,
        HELD=_held(stack),
        num_warps=min(max(width // 256, 1), 16),
        **following(parts.device, AFTER),
    )
    return out


def _rows_for(values: Tensor, routes: Routes, stack: Experts) -> int:
    if stack.invariant:
        return INVARIANT_ROWS
    return rows_for(len(values), routes.experts.shape[1], stack.total or len(stack.up), values.element_size())


def _held(stack: Experts) -> int:
    return len(stack.up) if stack.total else 0


def _together(
    product: Product,
    arranged: Arranged,
    places: tuple[Any, ...],
    sizes: tuple[Any, ...],
    tile: Tile | None,
    constants: dict[str, Any],
    routes: Routes,
) -> None:
    x, num_slots, turns = places[0], arranged.slots.shape[1], turns_for(arranged.rows)
    processors, shared_bytes, _ = machine(x.device)
    tile = tile or expert_tile_for(product, processors, shared_bytes)
    programs = -(-num_slots // turns) * turns * -(-product.outputs // tile.rows)
    kernels.together[(programs,)](
        *(*places, num_slots, *sizes),
        **constants,
        TOP_K=routes.experts.shape[1],
        ROWS=arranged.rows,
        TILE=tile.rows,
        STEP=tile.step,
        STAGES=tile.stages,
        TURNS=turns,
        EVEN=product.inputs % tile.step == 0,
        PRECISION="ieee" if x.dtype is torch.float32 else "tf32",
        num_warps=tile.warps,
        **following(x.device, LATE, product.inputs, x.stride(0)),
    )


def _alone(
    product: Product, x: Tensor, tile: Tile | None, constants: dict[str, Any], routes: Routes
) -> tuple[Tile, dict[str, Any]]:
    """The tile of products pair by pair, and what their kernels are made for."""
    processors, shared_bytes, _ = machine(x.device)
    tile = tile or expert_tile_for(product, processors, shared_bytes)
    constants |= {"N": product.outputs, "K": product.inputs, "TOP_K": routes.experts.shape[1]}
    constants |= {"TILE": tile.rows, "STEP": tile.step, "UNROLL": tile.stages, "num_warps": tile.warps}
    constants |= {"EVEN": product.inputs % tile.step == 0}
    return tile, constants | following(x.device, EARLY, product.inputs, x.stride(0))
