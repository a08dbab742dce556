"""Products whose rows do not depend on how many there are, in Triton's interpreter where there is no GPU."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quire.kernels import reference  # noqa: E402
from quire.kernels.reference import RmsNorm  # noqa: E402
from quire.kernels.triton.invariant import ENOUGH, ROWS, InvariantWeight, programs_of, tile_of  # noqa: E402
from quire.kernels.triton.products import (  # noqa: E402
    linear_add_norm_triton,
    linear_triton,
    normed_act_mul_triton,
    normed_linear_triton,
    pack_linear_triton,
)
from quire.kernels.triton.tiles import Product  # noqa: E402
from quire.resolve import EXACT_LOGPROBS  # noqa: E402
from quire.sampling.triton.logprobs import MOST  # noqa: E402
from tests.interpreter import INTERPRETED  # noqa: E402  (it imports Triton)
from tests.kernels.test_kernels import noise  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
COUNTS = (1, 2, 7, 16, 33, 64, 65, 130)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(70, 200), (140, 560)]  # outputs, inputs: one part and less than a tile; several of both
SHARED_BYTES = 227 * 1024


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 0.5) -> Tensor:
    return noise(*shape, dtype=dtype, seed=seed, scale=scale).to(DEVICE)


def packed(*shape: int, dtype: torch.dtype) -> InvariantWeight:
    weight = pack_linear_triton(draw(*shape, dtype=dtype, seed=1, scale=0.1), True)
    assert isinstance(weight, InvariantWeight)
    return weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_a_row_is_the_same_among_any_number(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    """With the rows in other places too; a vocabulary's logits are float32."""
    plain, gated = packed(outputs, inputs, dtype=dtype), packed(2 * outputs, inputs, dtype=dtype)
    most = COUNTS[-1]
    x, residual, bias = (
        draw(most, inputs, dtype=dtype),
        draw(most, outputs, dtype=dtype, seed=4),
        draw(outputs, dtype=dtype, seed=3),
    )
    norm = RmsNorm(draw(outputs, dtype=dtype, seed=5), 1e-6)

    def results(some: slice) -> list[Tensor]:
        total, values, scale = linear_add_norm_triton(x[some], plain, bias, residual[some], norm)
        assert scale is None
        return [
            *(total, values, normed_linear_triton(x[some], None, plain, bias)),
            normed_act_mul_triton(x[some], None, gated, None, "silu"),
            linear_triton(x[some], plain, None, torch.float32),
        ]

    whole = results(slice(0, most))
    for i, count in enumerate(COUNTS):
        first = (most - count) * (i % 2)
        for got, want in zip(results(slice(first, first + count)), whole, strict=True):
            assert torch.equal(got, want[first : first + count]), (count, first)
    assert not plain.arrivals.any() and not gated.arrivals.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_products_equal_the_reference(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    limit = 1e-5 if dtype is torch.float32 else 1e-2
    for num_rows in (1, 65):
        x, weight = draw(num_rows, inputs, dtype=dtype), packed(2 * outputs, inputs, dtype=dtype)
        bias = draw(2 * outputs, dtype=dtype, seed=3)
        want = x.float() @ weight.data.float().T + bias.float()
        got = linear_triton(x, weight, bias, torch.float32)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert linear_triton(x[None], weight, bias).shape == (1, num_rows, 2 * outputs)
        torch.testing.assert_close(
            normed_act_mul_triton(x, None, weight, bias, "gelu").float(),
            reference.act_mul.reference(want, "gelu"),
            rtol=limit,
            atol=limit,
        )


def test_parts_are_added_alike_by_one_program_and_by_several() -> None:
    outputs, inputs, dtype = 3072, 512, torch.bfloat16
    tile = tile_of(Product(outputs, inputs, ROWS), 1, SHARED_BYTES)
    tiles = outputs // tile.rows
    assert tile.split > 1 == programs_of(tile, 4 * tiles) and programs_of(tile, tiles) == tile.split
    weight, x = packed(outputs, inputs, dtype=dtype), draw(3 * ROWS + 1, inputs, dtype=dtype)
    by_one = linear_triton(x, weight, None, torch.float32)
    for some in (slice(0, 1), slice(190, 193)):
        assert torch.equal(linear_triton(x[some], weight, None, torch.float32), by_one[some])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_per_head(dtype: torch.dtype) -> None:
    weight, x = packed(3, 40, 48, dtype=dtype), draw(70, 3, 48, dtype=dtype)
    whole = linear_triton(x, weight, None)
    want = torch.einsum("tbi,boi->tbo", x.float(), weight.data.float())
    torch.testing.assert_close(whole.float(), want, rtol=1e-2, atol=1e-2)
    for some in (slice(0, 1), slice(3, 20), slice(5, 70)):
        assert torch.equal(linear_triton(x[some], weight, None), whole[some])


def test_no_rows() -> None:
    weight = packed(70, 200, dtype=torch.float32)
    assert linear_triton(draw(0, 200), weight, None).shape == (0, 70)


@pytest.mark.parametrize("outputs", [1024, 4096, 6144, 14336, 128256])
@pytest.mark.parametrize("inputs", [128, 1024, 4096, 14336])
def test_tiles_follow_from_the_weight_alone(outputs: int, inputs: int) -> None:
    """Nothing that a result depends on follows from rows or from the GPU; arrivals suffice; parts have some steps."""
    for dtype in DTYPES:
        for gated in (False, True):
            product = Product(outputs, inputs, ROWS, gated, dtype.itemsize)
            tile = tile_of(product, 1, SHARED_BYTES)
            small = tile_of(product, 1, 99 * 1024)
            assert small._replace(stages=tile.stages) == tile
            assert tile.split == 1 or inputs >= 4 * tile.split * tile.step
            tiles = -(-outputs // tile.rows)
            shared = [n for n in range(1, 9000, 63) if programs_of(tile, tiles * -(-n // ROWS)) > 1]
            assert all(tiles * -(-n // ROWS) < ENOUGH for n in shared)


def test_a_log_probability_of_the_most_that_deterministic_allows_has_a_kernel() -> None:
    assert EXACT_LOGPROBS == MOST
