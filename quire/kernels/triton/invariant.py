"""Products whose rows are the same bits for any number of rows, on NVIDIA GPUs.

One form serves a decode step and a prompt alike. An element of y is the sum, in their order, of a few parts of its
inputs, and a part the sum of steps by the same tensor-core instructions: tile, step and parts follow from the weight.
Of the number of rows only two things follow: how many programs there are, and whether the parts of a tile are added
up by one program, or by the last one to arrive of as many as there are parts. Norms are kernels of their own.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quire.kernels.triton import linear as kernels
from quire.kernels.triton.machine import following, machine
from quire.kernels.triton.tiles import Product, Tile, fitted

ROWS = 64  # of x that a program takes; one tensor-core instruction is as wide
TALL, SHORT = (
    Tile(128, 64, 1, 4, 8),
    Tile(64, 64, 1, 4, 4),
)  # of many outputs and of few; alike but for their rows
EXACT = Tile(64, 32, 1, 1, 8)  # float32, without tensor cores
ENOUGH = 96  # programs that keep a GPU busy; the same everywhere, so that results are too
MOST_PARTS = 4
LEAST_STEPS = 4  # of a part
BAND = 16  # tiles of rows that pass by a weight together, while it is in the second-level cache


@dataclass(frozen=True, slots=True)
class InvariantWeight:
    """A weight whose products are invariant; takes the place of a tensor as `linear`'s second argument."""

    data: Tensor  # [outputs, inputs] or [H, outputs, inputs]
    arrivals: (
        Tensor  # [ENOUGH] int32, zeros whenever no kernel runs. One product with a weight runs at a time.
    )


def pack(weight: Tensor) -> InvariantWeight:
    arrivals = torch.zeros(ENOUGH, dtype=torch.int32, device=weight.device)
    return InvariantWeight(weight.contiguous(), arrivals)


def multiply(
    x: Tensor,
    weight: InvariantWeight,
    bias: Tensor | None = None,
    *,
    act: str = "",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x @ weight.T + bias, as `dtype` or x's; with an act, act(gates) * ups of a weight of gates, then ups.

    x [..., inputs] -> [..., outputs]; or [T, H, inputs] -> [T, H, outputs] with a weight per head.
    """
    heads = len(weight.data) if weight.data.dim() == 3 else 1
    rows = x if weight.data.dim() == 3 else x.reshape(-1, 1, x.shape[-1])
    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    num_rows, outputs = len(rows), weight.data.shape[-2] // (2 if act else 1)
    out = x.new_empty((heads, num_rows, outputs), dtype=dtype)
    if num_rows:
        _launch(rows, weight, bias, out, act)
    return out.transpose(0, 1) if weight.data.dim() == 3 else out.view(*x.shape[:-1], outputs)


def _launch(x: Tensor, weight: InvariantWeight, bias: Tensor | None, out: Tensor, act: str) -> None:
    (heads, num_rows, outputs), inputs = out.shape, x.shape[-1]
    tile = tile_of(Product(outputs, inputs, ROWS, act != "", x.element_size()), heads, machine(x.device)[1])
    places = -(-outputs // tile.rows) * -(-num_rows // ROWS)
    spread = programs_of(tile, places)
    numbers = places * spread * (2 if act else 1) * tile.rows * ROWS if spread > 1 else 0
    partials = torch.empty(numbers, dtype=torch.float32, device=x.device)
    kernels.alike[(places * spread, heads)](
        *(x, weight.data, bias, out, partials, weight.arrivals),
        *(num_rows, x.stride(0), x.stride(1), part_inputs(tile, inputs), outputs, inputs),
        **constants_of(tile, inputs, act, x.dtype),
        **following(x.device, kernels.LATE if tile.stages > 1 else kernels.NEVER, x.shape[-1], x.stride(0)),
        SPREAD=spread,
    )


@functools.cache
def tile_of(product: Product, heads: int, shared_bytes: int) -> Tile:
    """The tile of all products with a weight: `split` is the number of parts. Only its stages depend on the GPU."""
    tile = TALL if MOST_PARTS * product.outputs >= ENOUGH * TALL.rows else SHORT
    if product.itemsize == 4:
        tile = EXACT
    tiles, parts = -(-product.outputs // tile.rows), 1
    while heads == 1 and tiles * parts < ENOUGH and parts < MOST_PARTS:
        if product.inputs < 2 * parts * LEAST_STEPS * tile.step:
            break
        parts *= 2
    return fitted(tile._replace(split=parts), product, shared_bytes)


def programs_of(tile: Tile, places: int) -> int:
    """Programs that share a tile of so many: one for each part, unless there are enough without."""
    return tile.split if places < ENOUGH else 1


def part_inputs(tile: Tile, inputs: int) -> int:
    """Inputs of a part, in whole steps; the last part may have fewer, or none."""
    return -(-inputs // (tile.split * tile.step)) * tile.step


def constants_of(tile: Tile, inputs: int, act: str, dtype: torch.dtype) -> dict[str, Any]:
    """What the kernel is compiled for, whatever the number of rows."""
    return {
        "ROWS": ROWS,
        "TILE": tile.rows,
        "STEP": tile.step,
        "SPLIT": tile.split,
        "STAGES": tile.stages,
        "BAND": BAND,
        "ACT": act,
        "EVEN": inputs % tile.step == 0,
        "PRECISION": "ieee" if dtype is torch.float32 else "tf32",
        "num_warps": tile.warps,
    }
