"""What a CPU computes together with a product: as separate operations would, for a row among any number."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quire.kernels import ops
from quire.kernels.cpu import native
from quire.kernels.cpu.products import (
    ACTIVATIONS,
    Machine,
    multiply_added,
    multiply_gated,
    multiply_normed,
)
from quire.kernels.quantized import quantize_linear, quantized_linear
from quire.kernels.reference import RmsNorm, RowScale
from tests.kernels.test_kernels import noise, row_scale

pytestmark = pytest.mark.skipif(native.load()[0] is None, reason="the C++ kernels are not built")
LEVELS = range(native.isa() + 1)
KINDS = ("float32", "bfloat16", "int8", "int4")
SIZES = [(70, 200), (128, 64), (384, 352)]
ROWS = (1, 2, 5, 6, 17, 33, 97)
MOST = 130
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 5e-3}  # of all numbers together


class Case:
    """A weight of a kind, and rows for it."""

    def __init__(self, kind: str, outputs: int, inputs: int):
        self.dtype = torch.float32 if kind == "float32" else torch.bfloat16
        weight = noise(outputs, inputs, dtype=self.dtype, seed=1, scale=0.1)
        self.x = noise(MOST, inputs, dtype=self.dtype, scale=0.5)
        self.bias = noise(outputs, dtype=self.dtype, seed=2)
        self.packed: Any
        self.plain: Any
        if kind.startswith("int"):
            bits = int(kind.removeprefix("int"))
            self.packed, self.plain = (
                ops.quantize_linear(weight, bits),
                quantize_linear.reference(weight, bits),
            )
        else:
            self.packed, self.plain = ops.pack_linear(weight), weight.double()

    def product(self) -> Tensor:
        """Not rounded."""
        if isinstance(self.plain, Tensor):
            return self.x.double() @ self.plain.T
        return quantized_linear(self.x, self.plain, None, torch.float32).double()


def close(got: Tensor, want: Tensor, limit: float | None = None) -> None:
    error = (got.double() - want).norm() / want.norm()
    assert error < (limit or LIMIT[got.dtype]), error


def same_among_others(compute: Any, found: tuple[Tensor, ...]) -> None:
    """compute(rows, threads): results of those rows."""
    for count in ROWS:
        some = slice(MOST - count, MOST)
        for got, want in zip(compute(some, 1), found, strict=True):
            assert torch.equal(got, want[some]), count
    for got, want in zip(compute(slice(0, MOST), 3), found, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_results_are_added_to_a_residual_and_their_squares_summed(
    outputs: int, inputs: int, level: int, kind: str
) -> None:
    case = Case(kind, outputs, inputs)
    residual = noise(MOST, 2 * outputs, dtype=case.dtype, seed=4)[:, :outputs]  # rows further apart
    for bias, gain, stream in (
        (case.bias, None, residual),
        (None, noise(outputs, dtype=case.dtype, seed=5), residual.float()),
    ):
        norm = RmsNorm(gain, 1e-5, 1.0)

        def compute(some: slice, threads: int) -> tuple[Tensor, ...]:
            machine = Machine(level, threads)
            found = multiply_added(case.x[some], case.packed, bias, stream[some], norm, machine)  # noqa: B023
            assert found is not None and found[2].eps == 1e-5
            return found[0], found[1], found[2].squares

        found = compute(slice(0, MOST), 1)
        total = stream.double() + case.product() + (0 if bias is None else bias.double())
        assert found[0].dtype is stream.dtype and found[1].dtype is case.dtype
        close(found[0], total)
        close(found[1], total if gain is None else total * (gain.double() + 1))
        padded = torch.nn.functional.pad(total, (0, -outputs % 64))
        close(found[2], padded.unflatten(1, (-1, 64)).square().sum(2))
        same_among_others(compute, found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", LEVELS)
def test_rows_of_a_norm_are_divided_by_its_rms(level: int, kind: str) -> None:
    case = Case(kind, 200, 352)
    scale = row_scale(MOST, 7)

    def compute(some: slice, threads: int) -> tuple[Tensor, ...]:
        rows, part = case.x[some], RowScale(scale.squares[some], scale.eps)
        found = multiply_normed(rows, part, case.packed, case.bias, torch.float32, Machine(level, threads))
        assert found is not None
        return (found,)

    found = compute(slice(0, MOST), 1)
    mean = scale.squares.double().sum(1, keepdim=True) / 352
    close(found[0], case.product() * torch.rsqrt(mean + scale.eps) + case.bias.double())
    same_among_others(compute, found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("outputs", "inputs"), [(128, 64), (384, 352)])
def test_gates_are_multiplied_by_their_ups(outputs: int, inputs: int, level: int, kind: str) -> None:
    case = Case(kind, outputs, inputs)
    scale = row_scale(MOST, 7)
    inverse = torch.rsqrt(scale.squares.double().sum(1, keepdim=True) / inputs + scale.eps)
    for act in ACTIVATIONS:
        bias = None if act == "gelu" else case.bias

        def compute(some: slice, threads: int) -> tuple[Tensor, ...]:
            part, machine = RowScale(scale.squares[some], scale.eps), Machine(level, threads)
            found = multiply_gated(case.x[some], part, case.packed, bias, act, machine)  # noqa: B023
            assert found is not None
            return (found,)

        found = compute(slice(0, MOST), 1)
        want = case.product() * inverse + (0 if bias is None else bias.double())
        assert found[0].dtype is case.dtype
        close(found[0], ops.act_mul.reference(want, act))
        if act in ("silu", "gelu"):
            same_among_others(compute, found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_among_more_than_the_second_cache_holds_is_the_same(kind: str) -> None:
    """Products of so many rows are computed in another order, where there is AMX."""
    case, rows, machine = Case(kind, 384, 2000), 720, Machine(native.isa(), 3)
    x, residual = case.x.repeat(6, 1)[:rows], noise(rows, 384, dtype=case.dtype, seed=4)
    scale, norm = row_scale(rows, 7), RmsNorm(None, 1e-5)
    added = multiply_added(x, case.packed, case.bias, residual, norm, machine)
    gated = multiply_gated(x, scale, case.packed, None, "silu", machine)
    assert added is not None and gated is not None
    for some in (slice(0, 5), slice(570, 600), slice(700, 720)):
        part = multiply_added(x[some], case.packed, case.bias, residual[some], norm, machine)
        assert part is not None
        assert torch.equal(part[0], added[0][some]) and torch.equal(part[1], added[1][some])
        assert torch.equal(part[2].squares, added[2].squares[some])
        inverse = RowScale(scale.squares[some], scale.eps)
        alone = multiply_gated(x[some], inverse, case.packed, None, "silu", machine)
        assert alone is not None and torch.equal(alone, gated[some])


@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_between_two_products_is_the_norm(kind: str) -> None:
    """Its parts, in the two products, make it whole."""
    first, second = Case(kind, 128, 352), Case(kind, 70, 128)
    residual, norm = (
        noise(MOST, 128, dtype=first.dtype, seed=4),
        RmsNorm(noise(128, seed=5).to(first.dtype), 1e-6),
    )
    total, values, scale = ops.linear_add_norm(first.x, first.packed, None, residual, norm)
    assert scale is not None
    want = ops.rms_norm.reference(residual.double() + first.product(), norm.weight, 1e-6)
    close(ops.finish_norm(values, scale), want)
    got = ops.normed_linear(values, scale, second.packed, second.bias)
    close(
        got, ops.linear(want.to(first.dtype), second.packed, second.bias).double(), 1e-2
    )  # int8 rounds twice


def test_what_has_no_kernel_takes_several_operations() -> None:
    x, residual = noise(5, 64), noise(5, 70)
    plain, heads = noise(70, 64, scale=0.1), ops.pack_linear(noise(3, 70, 64))
    norm, machine = RmsNorm(None, 1e-6), Machine(native.isa(), 1)
    packed = ops.pack_linear(plain)
    apart = RowScale(row_scale(5, 8).squares[:, ::2], 1e-6)
    assert multiply_added(x, plain, None, residual, norm, machine) is None
    assert multiply_added(x, packed, None, residual.half(), norm, machine) is None
    assert multiply_added(x, packed, None, residual, RmsNorm(noise(70).half(), 1e-6), machine) is None
    assert multiply_normed(x, None, heads, None, torch.float32, machine) is None
    assert multiply_normed(x, apart, packed, None, torch.float32, machine) is None
    assert multiply_gated(x, None, packed, None, "silu", machine) is None  # 35 are not whole blocks
    want = ops.linear_add_norm(x, packed, None, residual, norm)
    got = ops.linear_add_norm(x, plain, None, residual, norm)
    assert got[2] is None
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], ops.finish_norm(*want[1:]))
    got, want = (ops.normed_act_mul(x, apart, weight, None, "silu") for weight in (plain, packed))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        ops.normed_linear(x, apart, packed, None), ops.normed_linear.reference(x, apart, plain, None)
    )
