"""Products with weights on NVIDIA GPUs: which kernel, with which tiles. Registered beside their references.

Up to 64 rows are ours (linear.py), since a weight that is read once is all there is to wait for; more are cuBLAS's. The
sum of a residual stream is float32 from there on, and its norm is left unscaled: who reads it scales its own result.
Results differ from those of separate operations by what these would have rounded in between: the product before it is
added, gate and up before they are multiplied, and the norm's 1 / rms. Which of these happens depends on the
number of rows; where it may not, weights are of another form (invariant.py).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quire.kernels.reference import (
    RmsNorm,
    RowScale,
    finish_norm,
    linear,
    linear_add_norm,
    normed_act_mul,
    normed_linear,
    pack_linear,
)
from quire.kernels.triton import invariant as invariant_products
from quire.kernels.triton import linear as kernels
from quire.kernels.triton.invariant import InvariantWeight
from quire.kernels.triton.machine import following, machine
from quire.kernels.triton.ops import ACTIVATIONS, DTYPES, act_mul_triton, add_norm_triton, power_of_two
from quire.kernels.triton.tiles import ROWS, Product, Tile, bucket, tile_for

MOST_ROWS = ROWS[-1]
UNSCALED = (torch.bfloat16, torch.float32)  # float16 might overflow before it is divided by the rms
LEAST_TILE = 16  # rows of a weight, where programs share a tile
AHEAD = 256  # inputs of each row of a weight, fetched while the kernel ahead still runs
SUMMED = 2048  # squares that a program adds up at once


@dataclass(frozen=True, slots=True)
class StreamedWeight:
    """A weight with what its programs need to agree; takes the place of a tensor as `linear`'s second argument."""

    data: Tensor  # [outputs, inputs]
    arrivals: (
        Tensor  # [tiles] int32, zeros whenever no kernel runs. One product with a weight runs at a time.
    )


class Into(NamedTuple):
    """Where a product is added, and what is left there."""

    residual: Tensor  # [M, N]
    total: Tensor  # [M, N] float32
    norm: RmsNorm


Weight = Tensor | StreamedWeight | InvariantWeight


@pack_linear.on("cuda", *DTYPES)
def pack_linear_triton(weight: Tensor, invariant: bool = False) -> Weight:
    if invariant:
        return invariant_products.pack(weight)
    if weight.dim() != 2:
        return weight
    tiles = -(-weight.shape[0] // LEAST_TILE)
    return StreamedWeight(weight.contiguous(), torch.zeros(tiles, dtype=torch.int32, device=weight.device))


@linear.on("cuda", *DTYPES)
def linear_triton(x: Tensor, weight: Weight, bias: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    if isinstance(weight, InvariantWeight):
        return invariant_products.multiply(x, weight, bias, dtype=dtype)
    if isinstance(weight, Tensor):
        return linear.reference(x, weight, bias, dtype)
    num_rows = x.numel() // x.shape[-1]
    if 0 < num_rows <= MOST_ROWS:
        out = x.new_empty((*x.shape[:-1], len(weight.data)), dtype=dtype)
        multiply(x.reshape(num_rows, -1), weight, out, bias=bias)
        return out
    if dtype is torch.float32 and x.dtype is not dtype and x.is_cuda and bias is None and num_rows:
        y = torch.mm(x.reshape(num_rows, -1), weight.data.t(), out_dtype=dtype)  # never rounded to x's dtype
        return y.view(*x.shape[:-1], -1)
    return linear.reference(x, weight.data, bias, dtype)


@normed_linear.on("cuda", *DTYPES)
def normed_linear_triton(
    values: Tensor,
    scale: RowScale | None,
    weight: Weight,
    bias: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if scale is None or not isinstance(weight, StreamedWeight) or not _streams(values):
        return linear_triton(finish_norm_triton(values, scale), weight, bias, dtype)
    out = values.new_empty(len(values), len(weight.data), dtype=dtype)
    multiply(values, weight, out, bias=bias, scale=scale)
    return out


@normed_act_mul.on("cuda", *DTYPES)
def normed_act_mul_triton(
    values: Tensor, scale: RowScale | None, weight: Weight, bias: Tensor | None, kind: str
) -> Tensor:
    if isinstance(weight, InvariantWeight):
        y = finish_norm_triton(values, scale)
        return invariant_products.multiply(y, weight, bias, act=ACTIVATIONS[kind])
    if isinstance(weight, Tensor) or not _streams(values):
        return act_mul_triton(normed_linear_triton(values, scale, weight, bias), kind)
    out = values.new_empty(len(values), len(weight.data) // 2)
    multiply(values, weight, out, bias=bias, scale=scale, act=ACTIVATIONS[kind])
    return out


@linear_add_norm.on("cuda", *DTYPES)
def linear_add_norm_triton(
    x: Tensor, weight: Weight, bias: Tensor | None, residual: Tensor, norm: RmsNorm
) -> tuple[Tensor, Tensor, RowScale | None]:
    if not isinstance(weight, StreamedWeight) or not _streams(x) or x.dtype not in UNSCALED:
        return *add_norm_triton(linear_triton(x, weight, bias), residual, norm), None
    out = x.new_empty(len(x), len(weight.data))
    into = Into(residual.contiguous(), out.new_empty(out.shape, dtype=torch.float32), norm)
    squares = multiply(x, weight, out, bias=bias, into=into)
    return into.total, out, RowScale(squares, norm.eps)


@finish_norm.on("cuda", *DTYPES)
def finish_norm_triton(values: Tensor, scale: RowScale | None) -> Tensor:
    if scale is None or not len(values):
        return values
    out, (num_rows, size) = torch.empty_like(values), values.shape
    num_parts, width = scale.squares.shape[1], power_of_two(values.shape[1])
    kernels.finish_norm[(num_rows,)](
        *(values, scale.squares, out, num_parts, scale.eps),
        SIZE=size,
        WIDTH=width,
        PARTS=min(power_of_two(num_parts), SUMMED),
        num_warps=min(max(width // 512, 1), 16),
    )
    return out


def multiply(
    x: Tensor,
    weight: StreamedWeight,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    scale: RowScale | None = None,
    act: str = "",
    into: Into | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """out [M, N] = x [M, K] @ weight.T, M <= 64, and what else is asked for; see linear.py.

    Returns:
        Sums of squares of the rows of `into.total`, [M, tiles] float32; nothing of use without `into`.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    (num_rows, inputs), outputs = x.shape, out.shape[-1]
    rows = bucket(num_rows)
    processors, shared_bytes, _ = machine(x.device)
    if tile is None:
        product = Product(outputs, inputs, rows, act != "", x.element_size())
        tile = tile_for(product, processors, shared_bytes)
    tiles, num_parts = -(-outputs // tile.rows), 0 if scale is None else scale.squares.shape[1]
    new_squares = out.new_empty((num_rows, tiles) if into else (0, 0), dtype=torch.float32)
    places = (bias, out, *((into.residual, into.total, into.norm.weight) if into else (None, None, None)))
    places += (None if scale is None else scale.squares, new_squares if into else None)
    sizes = (outputs, inputs, num_parts, scale.eps if scale else 1.0, into.norm.offset if into else 0.0)
    constants = {"TILE": tile.rows, "STEP": tile.step, "ACT": act, "EVEN": inputs % tile.step == 0}
    constants |= {"PARTS": min(power_of_two(num_parts), SUMMED // rows), "num_warps": tile.warps}
    # Early only where programs are small: large ones would take the room of those that still run.
    constants |= following(x.device, kernels.EARLY if rows == 1 else kernels.LATE, inputs, x.stride(0))
    if rows == 1:
        kernels.one_row[(tiles,)](x, weight.data, *places, *sizes, UNROLL=tile.stages, **constants)
    else:
        _stream(x, weight, places, sizes, tile, constants)
    return new_squares


def _stream(
    x: Tensor,
    weight: StreamedWeight,
    places: tuple[Any, ...],
    sizes: tuple[Any, ...],
    tile: Tile,
    constants: dict[str, Any],
) -> None:
    (num_rows, inputs), outputs, split = x.shape, sizes[0], tile.split
    rows, tiles = bucket(num_rows), -(-outputs // tile.rows)
    share = -(-inputs // (split * tile.step)) * tile.step
    left = tiles * split * (2 if constants["ACT"] else 1) * tile.rows * rows if split > 1 else 0
    partials = torch.empty(left, dtype=torch.float32, device=x.device)
    kernels.stream[(tiles * split,)](
        *(x, weight.data, *places, partials, weight.arrivals, num_rows, x.stride(0), share, *sizes),
        **constants,
        ROWS=rows,
        SPLIT=split,
        STAGES=tile.stages,
        AHEAD=AHEAD,
        PRECISION="ieee" if x.dtype is torch.float32 else "tf32",
    )


def _streams(x: Tensor) -> bool:
    return x.dim() == 2 and 0 < len(x) <= MOST_ROWS
