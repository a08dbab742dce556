"""Products of few rows, in Triton's interpreter where there is no GPU: every tile computes the same, row by row."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quire.kernels import reference  # noqa: E402
from quire.kernels.reference import RmsNorm, RowScale  # noqa: E402
from quire.kernels.triton.products import (  # noqa: E402
    Into,
    StreamedWeight,
    linear_add_norm_triton,
    multiply,
    normed_act_mul_triton,
    pack_linear_triton,
)
from quire.kernels.triton.tiles import Tile  # noqa: E402
from tests.interpreter import INTERPRETED  # noqa: E402  (it imports Triton)
from tests.kernels.test_kernels import noise  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TILES = [  # of 70 outputs and 200 inputs: whole and partial ones, programs without inputs, one step and many
    Tile(16, 64, 1, 3, 1),
    Tile(16, 32, 4, 2, 1),
    Tile(64, 64, 2, 2, 4),
    Tile(32, 64, 8, 2, 2),
]
OUTPUTS, INPUTS = 70, 200


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 0.5) -> Tensor:
    return noise(*shape, dtype=dtype, seed=seed, scale=scale).to(DEVICE)


def weight_of(rows: int, dtype: torch.dtype = torch.float32) -> StreamedWeight:
    packed = pack_linear_triton(draw(rows, INPUTS, dtype=dtype, seed=1, scale=0.1))
    assert isinstance(packed, StreamedWeight)
    return packed


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 3, 64])
def test_every_tile_computes_the_same(num_rows: int, tile: Tile) -> None:
    x, scale = draw(num_rows, INPUTS), RowScale(draw(num_rows, 9, seed=2).square() + 1, 1e-6)
    bias = draw(2 * OUTPUTS, seed=3)
    gated, plain = weight_of(2 * OUTPUTS), weight_of(OUTPUTS)
    got = torch.empty(num_rows, OUTPUTS, device=DEVICE)
    multiply(x, gated, got, bias=bias, scale=scale, act="silu", tile=tile)
    exact_scale = RowScale(scale.squares.double(), scale.eps)
    want = reference.normed_act_mul.reference(
        x.double(), exact_scale, gated.data.double(), bias.double(), "silu"
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    norm = RmsNorm(draw(OUTPUTS, seed=5), 1e-6, 1.0)
    into = Into(draw(num_rows, OUTPUTS, seed=4), torch.empty_like(got), norm)
    squares = multiply(x, plain, got, into=into, tile=tile)
    total = into.residual + x @ plain.data.T
    torch.testing.assert_close(into.total, total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(squares.sum(1), total.square().sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, total * (norm.weight + 1.0), rtol=1e-5, atol=1e-5)
    assert not gated.arrivals.any() and not plain.arrivals.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    """Of as many rows as share tiles."""
    weight, norm = weight_of(OUTPUTS, dtype), RmsNorm(draw(OUTPUTS, dtype=dtype), 1e-6)
    x, residual = draw(16, INPUTS, dtype=dtype), draw(16, OUTPUTS, dtype=dtype, seed=4)
    total, values, scale = linear_add_norm_triton(x, weight, None, residual, norm)
    assert scale is not None
    for rows in (slice(0, 9), slice(5, 16)):
        part = linear_add_norm_triton(x[rows], weight, None, residual[rows], norm)
        assert part[2] is not None
        assert torch.equal(part[0], total[rows]) and torch.equal(part[1], values[rows])
        assert torch.equal(part[2].squares, scale.squares[rows])
    gated = weight_of(2 * OUTPUTS, dtype)
    scale = RowScale(draw(16, 5, seed=2).square() + 1, 1e-6)
    whole = normed_act_mul_triton(x, scale, gated, None, "silu")
    some = normed_act_mul_triton(x[3:13], RowScale(scale.squares[3:13], 1e-6), gated, None, "silu")
    assert torch.equal(some, whole[3:13])


def test_the_sum_of_bfloat16_is_not_rounded() -> None:
    weight, x = weight_of(OUTPUTS, torch.bfloat16), draw(4, INPUTS, dtype=torch.bfloat16)
    residual = draw(4, OUTPUTS, seed=4)
    total, values, scale = linear_add_norm_triton(x, weight, None, residual, RmsNorm(None, 1e-6))
    want = residual.double() + x.double() @ weight.data.double().T
    assert total.dtype == torch.float32 and values.dtype == torch.bfloat16
    torch.testing.assert_close(total.double(), want, rtol=0, atol=1e-5)


def test_float16_is_scaled_before_it_can_overflow() -> None:
    weight, x = weight_of(OUTPUTS, torch.float16), draw(4, INPUTS, dtype=torch.float16)
    residual = torch.full((4, OUTPUTS), 6e4, dtype=torch.float16, device=DEVICE)
    gain = torch.full((OUTPUTS,), 4.0, dtype=torch.float16, device=DEVICE)
    _, values, scale = linear_add_norm_triton(x, weight, None, residual, RmsNorm(gain, 1e-6))
    assert scale is None and bool(values.isfinite().all())
