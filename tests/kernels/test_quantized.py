"""Products with weights of 8 and 4 bits: as the reference computes them, whoever else is in the batch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from quire.kernels import ops
from quire.kernels.cpu import native
from quire.kernels.cpu.products import Machine, PackedQuantized, multiply
from quire.kernels.quantized import MOST_INPUTS, Quantized, quantize_linear, quantized_linear
from tests.kernels.test_kernels import dense, noise

BUILT = native.load()[0] is not None
native_only = pytest.mark.skipif(not BUILT, reason="the C++ kernels are not built")
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = [(64, 64), (70, 200), (130, 1024), (1, 33), (200, 320)]
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
ROWS = (1, 2, 3, 4, 5, 7, 17, 100)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_products_equal_the_reference(outputs: int, inputs: int, dtype: torch.dtype, bits: int) -> None:
    """Both add up whole numbers exactly, so that little is left to differ."""
    weight, bias = noise(outputs, inputs, dtype=dtype, seed=1, scale=0.1), noise(outputs, dtype=dtype, seed=2)
    packed, plain = ops.quantize_linear(weight, bits), quantize_linear.reference(weight, bits)
    for rows in ROWS:
        x = noise(rows, 2 * inputs, dtype=dtype, seed=rows)[:, :inputs]  # rows further apart
        for b in (None, bias):
            got, want = ops.linear(x, packed, b, torch.float32), quantized_linear(x, plain, b, torch.float32)
            torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-5)
            assert ops.linear(x, packed, b).dtype is dtype
    assert ops.linear(x[None, :3], packed, None).shape == (1, 3, outputs)


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.012), (4, 0.12)])
def test_what_is_lost_is_little(bits: int, limit: float) -> None:
    weight, x = noise(256, 1024, seed=1), noise(64, 1024)
    want = x @ weight.T
    got = ops.linear(x, ops.quantize_linear(weight, bits), None)
    assert (got - want).norm() < limit * want.norm()
    plain = quantize_linear.reference(weight, bits)
    assert (dense(plain) - weight).norm() < limit * weight.norm()


@native_only
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("level", range(native.isa() + 1))
def test_a_row_is_the_same_bits_among_any_number_on_every_instruction_set(level: int, bits: int) -> None:
    library = native.load()[0]
    assert library is not None
    outputs, inputs = 200, 320
    weight, x = (
        noise(outputs, inputs, dtype=torch.bfloat16, seed=1, scale=0.1),
        noise(130, inputs, dtype=torch.bfloat16),
    )
    packed = ops.quantize_linear(weight, bits)
    assert isinstance(packed, PackedQuantized)
    again = PackedQuantized(
        torch.zeros_like(packed.data), torch.zeros_like(packed.scales), outputs, inputs, packed.padded, bits
    )
    library.quire_quantize_weight(
        *(level, 1, True, bits, again.data.data_ptr(), again.scales.data_ptr(), weight.data_ptr()),
        *(outputs, inputs, packed.padded),
    )
    torch.testing.assert_close(dense(again), dense(packed), rtol=1e-6, atol=1e-6)

    def product(x: Tensor, threads: int) -> Tensor:
        out = torch.empty(len(x), outputs)
        multiply(x, packed, None, out, Machine(level, threads))
        return out

    whole = product(x, 1)
    torch.testing.assert_close(whole, ops.linear(x, packed, None, torch.float32), rtol=1e-6, atol=1e-5)
    for rows in ROWS:
        assert torch.equal(product(x[-rows:], 1), whole[-rows:]), rows
    assert torch.equal(product(x, 3), whole)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_a_number_stays_so_and_is_nobody_elses(wrong: float, bits: int) -> None:
    weight, x = noise(70, 200, seed=1), noise(5, 200)
    packed = ops.quantize_linear(weight, bits)
    want = ops.linear(x, packed, None)
    x[2, 131] = wrong
    got = ops.linear(x, packed, None)
    assert not got[2].isfinite().any()
    assert torch.equal(got[[0, 1, 3, 4]], want[[0, 1, 3, 4]])
    weight[3, 7] = wrong
    got = ops.linear(noise(5, 200), ops.quantize_linear(weight, bits), None)
    assert not got[:, 3].isfinite().any() and got[:, 4].isfinite().all()


@pytest.mark.parametrize("make", [ops.quantize_linear, quantize_linear.reference])
def test_what_cannot_be_quantized_is_refused(make: object) -> None:
    for weight, bits in (
        (torch.zeros(2, 3, 4), 8),
        (torch.zeros(1, 1).expand(1, MOST_INPUTS + 1), 8),
        (torch.zeros(4, 4), 3),
    ):
        with pytest.raises(ValueError, match="two dimensions"):
            make(weight, bits)  # type: ignore[operator]


def test_without_a_kernel_the_reference_takes_its_own_form() -> None:
    weight, x = noise(70, 200), noise(5, 200)
    plain = quantize_linear.reference(weight, 8)
    assert isinstance(plain, Quantized)
    got = ops.linear.reference(x, plain, None)
    torch.testing.assert_close(got, ops.linear(x, plain, None))
    want = x @ dense(plain).T  # whose inputs are not rounded
    assert (got - want).norm() < 0.01 * want.norm()


def flags(address: int) -> list[str]:
    """What the system knows of the memory there."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            begin, end = (int(word, 16) for word in words[0].split("-"))
            found = begin <= address < end
        elif found and words[0] == "VmFlags:":
            return words[1:]
    return []


@native_only
@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="this system has no huge pages")
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_system_may_make_huge_pages_of_weights(bits: int) -> None:
    weight = torch.zeros(2048, 2048, dtype=torch.bfloat16)
    data = (ops.pack_linear(weight) if bits == 16 else ops.quantize_linear(weight, bits)).data
    assert "hg" in flags(data.data_ptr() + data.nbytes // 2)
