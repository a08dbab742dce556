"""Every registered kernel against its reference, over shapes and dtypes; Triton's on the CPU if need be."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.kernels import ops
from quire.kernels.cpu import native
from quire.kernels.cpu.calls import kernel
from quire.kernels.cpu.products import Machine, PackedQuantized, PackedWeight, multiply
from quire.kernels.dispatch import Kernel, Op, op
from quire.kernels.quantized import GROUP, Quantized
from tests.kernels.recurrences import steps
from tests.kernels.sequences import convolutions, noise, scans

if importlib.util.find_spec("triton") is not None:
    importlib.import_module("tests.interpreter")
    # These register kernels for GPUs, whether there is one or not.
    importlib.import_module("quire.kernels.triton.ops")
    STREAMED: Any = importlib.import_module("quire.kernels.triton.products").StreamedWeight
else:
    STREAMED = ()

GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # the latter: in Triton's interpreter
OPS = [value for name in ops.__all__ if isinstance(value := getattr(ops, name), Op)]
OPS.remove(ops.pack_experts)  # whose result is what other operations take
REGISTERED = [(o, device, dtype) for o in OPS for device, dtype in o.kernels if device != "meta"]
TOLERANCE = {
    torch.float32: 4e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
    torch.int64: 0.0,
}  # an erf near -1 loses digits
MOST_INTERPRETED = 40  # rows; the interpreter takes milliseconds for each
Inputs = Iterator[tuple[object, ...]]


def norms(dtype: torch.dtype) -> Inputs:
    for shape in ((1, 16), (3, 1024), (70, 640), (5, 33), (2, 3, 48)):
        x, weight = noise(*shape, dtype=dtype), noise(shape[-1], dtype=dtype, seed=1)
        yield x, weight, 1e-6
        yield x, None, 1e-5
        yield x, weight, 1e-6, 1.0
    yield noise(4, 3, 16, dtype=dtype), noise(3, 16, dtype=dtype, seed=1), 1e-6  # a weight per head
    yield noise(6, 80, dtype=dtype)[:, 16:64], noise(48, dtype=dtype), 1e-6  # rows further apart
    yield noise(6, 4, 32, dtype=dtype)[:, 1:3], noise(32, dtype=dtype), 1e-6
    yield torch.zeros(2, 32, dtype=dtype), noise(32, dtype=dtype), 1e-6


def layer_norms(dtype: torch.dtype) -> Inputs:
    for shape in ((1, 16), (3, 1024), (5, 33), (2, 3, 48)):
        x, weight = noise(*shape, dtype=dtype) + 1, noise(shape[-1], dtype=dtype, seed=1)
        yield x, weight, noise(shape[-1], dtype=dtype, seed=2), 1e-6
        yield x, weight, None, 1e-6, 1.0
        yield x, None, None, 1e-5
    yield noise(4, 3, 16, dtype=dtype), noise(3, 16, dtype=dtype, seed=1), None, 1e-6  # a weight per head
    yield noise(6, 80, dtype=dtype)[:, 16:64], noise(48, dtype=dtype), noise(48, dtype=dtype), 1e-6


def ropes(dtype: torch.dtype) -> Inputs:
    for tokens, heads, size, half in (
        (1, 3, 128, 64),
        (9, 5, 64, 32),
        (33, 24, 80, 16),
        (4, 2, 18, 5),
        (200, 8, 64, 32),
    ):
        angles = noise(50, half, seed=2)
        x, positions = noise(tokens, heads + 2, size, dtype=dtype), (torch.arange(tokens) * 7) % 50
        for weight in (None, noise(heads, size, seed=3)):
            for interleaved in (False, True):
                yield x[:, :heads].clone(), weight, 1e-6, angles.cos(), angles.sin(), positions, interleaved
                yield x[:, 1 : heads + 1], weight, 1e-6, angles.cos(), angles.sin(), positions, interleaved


def gates(dtype: torch.dtype) -> Inputs:
    for kind in ("silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "relu2", "sigmoid"):
        for shape in ((1, 32), (5, 6144), (33, 70), (2, 3, 64)):
            yield noise(*shape, dtype=dtype, scale=4.0), kind
    yield torch.linspace(-9, 9, 2000, dtype=dtype).repeat(2, 1), "gelu"
    yield (
        torch.tensor([[0.0, -200.0, 200.0, 1e30, -1e30, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]], dtype=dtype),
        "silu",
    )


def pairs(dtype: torch.dtype) -> Inputs:
    """Gates and what they let through; of the last kind, which is no activation, beyond its limits too."""
    yield from gates(dtype)
    for shape in ((1, 32), (5, 6144), (33, 70)):
        yield noise(*shape, dtype=dtype, scale=6.0), "swiglu_oai"


@dataclass(frozen=True)
class Pack:
    """A weight to be packed for the device whose kernel is tested."""

    dense: Tensor


def products(dtype: torch.dtype) -> Inputs:
    for rows, inputs, outputs in ((1, 64, 48), (8, 96, 130), (40, 33, 7), (70, 64, 48), (0, 64, 48)):
        x, weight = (
            noise(rows, inputs, dtype=dtype, scale=0.5),
            noise(outputs, inputs, dtype=dtype, seed=1, scale=0.1),
        )
        for bias in (None, noise(outputs, dtype=dtype, seed=2)):
            yield x, Pack(weight), bias
            yield x, Pack(weight), bias, torch.float32
            yield x, weight, bias
    for inputs in (64, 40):  # a weight per head, and heads further apart than they are long
        x, weight = noise(9, 3, 96, dtype=dtype), noise(3, 70, inputs, dtype=dtype, seed=1, scale=0.1)
        yield x[..., :inputs], Pack(weight), None
        yield x[..., :inputs], weight, None
    yield noise(5, 3, 64, dtype=dtype), Pack(noise(8, 64, dtype=dtype, scale=0.1)), None
    yield noise(5, 96, dtype=dtype)[:, 32:], Pack(noise(8, 64, dtype=dtype, scale=0.1)), None


def row_scale(rows: int, parts: int, seed: int = 3) -> ops.RowScale:
    return ops.RowScale(noise(rows, parts, seed=seed).square() + 1, 1e-6)


def normed_products(dtype: torch.dtype) -> Inputs:
    for rows, inputs, outputs, parts in ((1, 64, 24, 3), (7, 96, 33, 70), (33, 40, 5, 1), (70, 64, 24, 4)):
        x, scale = noise(rows, inputs, dtype=dtype, scale=0.5), row_scale(rows, parts)
        weight = noise(2 * outputs, inputs, dtype=dtype, seed=1, scale=0.1)
        yield x, scale, Pack(weight), noise(2 * outputs, dtype=dtype, seed=2)
        yield x, scale, Pack(weight), None
    yield x[:9], None, Pack(weight), None
    yield x, scale, weight, None


def gated_products(dtype: torch.dtype) -> Inputs:
    for i, args in enumerate(normed_products(dtype)):
        yield *args, ("silu", "gelu_pytorch_tanh", "swiglu_oai")[i % 3]


def added_products(dtype: torch.dtype) -> Inputs:
    for rows, inputs, outputs in ((1, 96, 50), (9, 64, 130), (20, 30, 65), (70, 64, 48)):
        x, residual = noise(rows, inputs, dtype=dtype, scale=0.5), noise(rows, outputs, dtype=dtype, seed=4)
        weight = noise(outputs, inputs, dtype=dtype, seed=1, scale=0.1)
        for bias, gain in ((None, noise(outputs, dtype=dtype, seed=2)), (noise(outputs, dtype=dtype), None)):
            yield x, Pack(weight), bias, residual.float(), ops.RmsNorm(gain, 1e-5, 1.0)
        yield x, Pack(weight), None, residual, ops.RmsNorm(gain, 1e-6)
    yield x, weight, None, residual, ops.RmsNorm(gain, 1e-6)


def sums(dtype: torch.dtype) -> Inputs:
    for shape in ((1, 16), (3, 1024), (5, 33), (0, 16)):
        x, residual, gain = noise(*shape, dtype=dtype), noise(*shape, dtype=dtype, seed=1), noise(shape[1])
        after = ops.RmsNorm(noise(shape[1], dtype=dtype, seed=2), 1e-5, 1.0)
        yield x, residual, ops.RmsNorm(gain.to(dtype), 1e-6)
        yield x, residual.float(), ops.RmsNorm(None, 1e-6), after
        yield x, residual, ops.RmsNorm(gain.to(dtype), 1e-6, 1.0), ops.RmsNorm(None, 1e-6)
    wide = noise(6, 80, dtype=dtype)
    yield wide[:, 16:64], wide[:, 32:], ops.RmsNorm(noise(48, dtype=dtype), 1e-6)  # rows further apart


def plain_sums(dtype: torch.dtype) -> Inputs:
    for x, residual, *_ in sums(dtype):
        yield x, residual


def lookups(dtype: torch.dtype) -> Inputs:
    for size in (33, 64):
        table = noise(150, size, dtype=torch.bfloat16 if dtype is torch.int64 else dtype)
        for ids in (torch.tensor([149]), torch.arange(300) % 150, torch.arange(0), torch.arange(40)[::7]):
            for form in (table, table.float(), Pack(table), Pack(table.float())):
                yield ids, form
                yield ids, form, 5.75
                yield ids * 3 - 40, form, 5.75, 30


def tables(dtype: torch.dtype) -> Inputs:
    table = noise(70, 32, dtype=dtype)
    yield table, None
    yield table, Pack(table)


def picks(dtype: torch.dtype) -> Inputs:
    table = (noise(3, 20) * 100).to(dtype)
    for columns in (torch.tensor([19]), torch.arange(20), torch.arange(0), torch.arange(20)[::3]):
        yield table, columns
        yield table[:2], columns
        yield table.t().contiguous().t(), columns


def unscaled(dtype: torch.dtype) -> Inputs:
    for rows, size, parts in ((1, 16, 1), (5, 33, 70), (20, 640, 5)):
        yield noise(rows, size, dtype=dtype), row_scale(rows, parts)
    yield noise(2, 16, dtype=dtype), None


def weights(dtype: torch.dtype) -> Inputs:
    yield (noise(64, 48, dtype=dtype),)
    yield (noise(7, 33, dtype=dtype),)
    yield (noise(3, 16, 40, dtype=dtype).transpose(1, 2),)


def choices(dtype: torch.dtype) -> Inputs:
    for tokens, count in ((1, 8), (9, 24)):
        logits = noise(tokens, count, dtype=dtype)
        yield logits, ops.Rule(2), None
        yield logits, ops.Rule(4, "sigmoid", groups=4, top_groups=2, scale=2.5), noise(count, seed=1)


def mixtures(dtype: torch.dtype) -> Inputs:
    """Small ones; see test_experts.py."""
    for tokens in (1, 5):
        routes = ops.route.reference(noise(tokens, 4), ops.Rule(2), None)
        up = noise(4, 48, 32, dtype=dtype, seed=1, scale=0.2)
        down = noise(4, 32, 24, dtype=dtype, seed=2, scale=0.2)
        stack = ops.Experts(up, down, None, None, "silu", True)
        yield noise(tokens, 32, dtype=dtype, scale=0.5), row_scale(tokens, 3), routes, stack, None


def quantizable(dtype: torch.dtype) -> Inputs:
    for outputs, inputs in ((64, 64), (70, 200), (1, 33), (130, 1024)):
        weight = noise(outputs, inputs, dtype=dtype, scale=0.05)
        weight[0, :64] = 0  # a group, and perhaps a row, of nothing
        yield weight, 8
        yield weight, 4


def added_mixtures(dtype: torch.dtype) -> Inputs:
    for args in mixtures(dtype):
        norm = ops.RmsNorm(noise(32, dtype=dtype, seed=5), 1e-6)
        yield *args, noise(*args[0].shape, seed=4), norm


def recurrences(dtype: torch.dtype) -> Inputs:
    """Small ones; see test_recurrent.py."""
    for step in steps(dtype):
        yield step.arguments()


INPUTS: dict[str, Callable[[torch.dtype], Inputs]] = {
    "rms_norm": norms,
    "layer_norm": layer_norms,
    "norm_rope": ropes,
    "act": gates,
    "act_mul": pairs,
    "linear": products,
    "pack_linear": weights,
    "quantize_linear": quantizable,
    "normed_linear": normed_products,
    "normed_act_mul": gated_products,
    "linear_add_norm": added_products,
    "add": plain_sums,
    "add_norm": sums,
    "finish_norm": unscaled,
    "causal_conv": convolutions,
    "selective_scan": scans,
    "embed": lookups,
    "pick": picks,
    "as_table": tables,
    "route": choices,
    "experts": mixtures,
    "experts_add_norm": added_mixtures,
    "recurrence": recurrences,
}
OTHER = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}
COMPOSED = (
    "normed_linear",
    "normed_act_mul",
    "linear_add_norm",
    "add_norm",
    "experts",
    "experts_add_norm",
)  # parts round on the way, wholes do not


def plain(x: object) -> object:
    """A packed weight as the tensor it was; anything else as it is."""
    if isinstance(x, Pack):
        return x.dense
    if isinstance(x, STREAMED):
        return x.data
    if isinstance(x, Quantized | PackedQuantized):
        return dense(x)
    if not isinstance(x, PackedWeight):
        return x
    rows = x.data.transpose(2, 3).flatten(3).flatten(1, 2)[:, : x.outputs, : x.inputs]
    return rows if x.groups > 1 else rows[0]


def dense(weight: Quantized | PackedQuantized) -> Tensor:
    """The numbers that a quantized weight stands for."""
    if isinstance(weight, Quantized):
        size = weight.integers.shape[1] if weight.scales.shape[1] == 1 else GROUP
        return weight.integers * weight.scales.repeat_interleave(size, 1)[:, : weight.integers.shape[1]]
    if weight.bits == 8:
        integers = weight.data.view(len(weight.data), -1, 64, 4).transpose(1, 2).flatten(2) - 128.0
        scales = weight.scales[..., None]
    else:
        both = weight.data.view(len(weight.data), -1, 64, 4).transpose(1, 2)
        integers = torch.cat((both & 15, both >> 4), 3).flatten(2) - 8.0
        scales = weight.scales.float().transpose(1, 2).repeat_interleave(GROUP, 2)
    return (integers * scales).flatten(0, 1)[: weight.outputs, : weight.inputs]


def copy(x: object) -> object:
    return x.clone() if isinstance(x, Tensor) else x


def moved(x: Any, device: torch.device) -> Any:
    """x on the device, a view as far apart as it was."""
    if isinstance(x, Pack):
        return Pack(moved(x.dense, device))
    if isinstance(x, tuple):
        return type(x)(*(moved(part, device) for part in x))
    if not isinstance(x, Tensor) or x.device == device:
        return x
    there = torch.zeros(x.untyped_storage().nbytes() // x.itemsize, dtype=x.dtype, device=device)
    return there.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)


def results(found: Any) -> list[Tensor]:
    """The tensors that an operation returned, with rows scaled that were left unscaled."""
    if not isinstance(found, tuple):
        return [found]
    total, y, *scale = found
    return [total, ops.finish_norm.reference(y.float(), scale[0]).to(y.dtype) if scale and scale[0] else y]


def check(
    o: Op, kernel: Kernel, inputs: Inputs, dtype: torch.dtype, device: torch.device, registered: str = ""
) -> None:
    """`registered`: the device that the kernel is for, if the interpreter runs it on another one."""
    pack = ops.pack_linear.kernels.get((registered or device.type, dtype), ops.pack_linear.reference)
    for args in inputs:
        args = tuple(moved(x, device) for x in args)
        expected = results(plain(o.reference(*[copy(plain(x)) for x in args])))
        found = results(plain(kernel(*[pack(x.dense) if isinstance(x, Pack) else x for x in args])))
        exact = results(o.reference(*[precise(plain(x)) for x in args])) if o.name in COMPOSED else expected
        for got, want, ideal in zip(found, expected, exact, strict=True):
            assert got.dtype in (want.dtype, torch.float32) and got.shape == want.shape
            overall = o.name in COMPOSED
            compare(got.float(), ideal.float(), TOLERANCE[dtype] * (1 + overall), overall, args)


def precise(x: Any) -> Any:
    """x in float32, and what is in it."""
    if isinstance(x, tuple):
        return type(x)(*map(precise, x))
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x


def compare(got: Tensor, want: Tensor, limit: float, overall: bool, args: Any) -> None:
    """Each number, relative to the greater of it and 1; or `overall`, relative to all of them."""
    size = want.abs().max() * 2 if overall and want.numel() else want.abs().clamp(min=1)
    same = (got == want) | (got.isnan() & want.isnan())  # infinities, too
    error = ((got - want).abs() / size).masked_fill(same, 0).nan_to_num(torch.inf)
    assert error.numel() == 0 or error.max() <= limit, [getattr(x, "shape", x) for x in args]
    assert not overall or (got - want).norm() <= limit * want.norm(), [getattr(x, "shape", x) for x in args]


@pytest.mark.filterwarnings(
    "ignore::RuntimeWarning:triton"
)  # numpy's: that an exponential overflows is expected
@pytest.mark.parametrize(
    ("o", "device", "dtype"),
    REGISTERED,
    ids=[f"{o.name}-{device}-{dtype}" for o, device, dtype in REGISTERED],
)
def test_kernel_equals_reference(o: Op, device: str, dtype: torch.dtype) -> None:
    where = GPU if device == "cuda" else torch.device(device)
    inputs = INPUTS[o.name](dtype)
    if where.type != device:  # in the interpreter
        most = MOST_INTERPRETED if o.name not in COMPOSED else 2 * MOST_INTERPRETED  # cuBLAS's, too
        inputs = (args for args in inputs if isinstance(args[0], Tensor) and len(args[0]) <= most)
    check(o, o.kernels[device, dtype], inputs, dtype, where, device)


@pytest.mark.skipif(native.load()[0] is None, reason="the C++ kernels are not built")
@pytest.mark.parametrize("level", range(native.isa() + 1))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_instruction_set_computes_the_same(level: int, dtype: torch.dtype) -> None:
    bf16, rows, size = dtype is torch.bfloat16, 3, 70
    x, weight = noise(rows, size, dtype=dtype), noise(size, dtype=dtype, seed=1)
    out = torch.empty_like(x)
    pointers = (out.data_ptr(), x.data_ptr(), weight.data_ptr())
    kernel("quire_rms_norm")(level, 1, bf16, *pointers, rows, size, size, 1e-6, 0.5)
    want = ops.rms_norm.reference(x, weight, 1e-6, 0.5)
    torch.testing.assert_close(out, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    half = torch.empty(rows, size // 2, dtype=dtype)
    kernel("quire_act")(level, 1, bf16, half.data_ptr(), x.data_ptr(), rows, size // 2, size // 2, 0, True)
    want = ops.act_mul.reference(x, "silu")
    torch.testing.assert_close(half, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    angles, positions, gain = noise(8, 21, seed=2), torch.tensor([5, 0, 7]), noise(1, size, seed=3)
    cos, sin = angles.cos(), angles.sin()
    for interleaved in (False, True):
        turned = x.clone()
        kernel("quire_norm_rope")(
            *(level, 1, bf16, turned.data_ptr(), rows, 1, size, size, 21, gain.data_ptr()),
            *(cos.data_ptr(), sin.data_ptr(), positions.data_ptr(), 1e-6, interleaved),
        )
        want = ops.norm_rope.reference(x[:, None], gain, 1e-6, cos, sin, positions, interleaved)[:, 0]
        torch.testing.assert_close(turned, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.skipif(native.load()[0] is None, reason="the C++ kernels are not built")
@pytest.mark.parametrize("level", range(native.isa() + 1))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_is_the_same_bits_for_any_number_of_rows(level: int, dtype: torch.dtype) -> None:
    inputs, outputs = 352, 200
    x, dense = noise(130, inputs, dtype=dtype), noise(outputs, inputs, dtype=dtype, seed=1, scale=0.1)
    weight = ops.pack_linear(dense)

    def product(x: Tensor, threads: int) -> Tensor:
        out = torch.empty(len(x), outputs)
        multiply(x, weight, None, out, Machine(level, threads))
        return out

    whole = product(x, 1)
    torch.testing.assert_close(whole.double(), x.double() @ dense.double().T, rtol=0, atol=1e-4)
    for rows in (1, 2, 3, 5, 6, 7, 15, 16, 17, 31, 32, 33, 64, 97):
        assert torch.equal(product(x[-rows:], 1), whole[-rows:]), rows
    assert torch.equal(product(x, 3), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_lies_beside_a_row_is_not_read_as_its_inputs(dtype: torch.dtype) -> None:
    whole = torch.full((40, 3, 64), torch.nan, dtype=dtype)
    whole[..., :33] = noise(40, 3, 33, dtype=dtype)
    for x, weight in (
        (whole[:, 0, :33], noise(70, 33, dtype=dtype, scale=0.1)),
        (whole[..., :33], noise(3, 70, 33, dtype=dtype, scale=0.1)),
    ):
        got = ops.linear(x, ops.pack_linear(weight), None)
        assert got.isfinite().all()
        assert torch.equal(got, ops.linear(x.contiguous(), ops.pack_linear(weight), None))


def test_every_operation_with_kernels_is_tested() -> None:
    assert {o.name for o, _, _ in REGISTERED} <= INPUTS.keys()
    assert native.load()[0] is None or REGISTERED != []


def test_dispatch_is_by_device_and_dtype_of_the_first_argument() -> None:
    @op
    def double(x: Tensor) -> Tensor:
        """x + x."""
        return x + x

    @double.on("cpu", torch.int64)
    def double_int(x: Tensor) -> Tensor:
        return x << 1 | 1  # wrong on purpose, to be seen

    assert double.name == "double"
    assert double(torch.tensor(3)).item() == 7
    assert double(torch.tensor(3.0)).item() == 6.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_take_weights_of_another_type(dtype: torch.dtype) -> None:
    x, weight = noise(3, 50, dtype=dtype), noise(50, dtype=torch.bfloat16).to(OTHER[dtype])
    want = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.float()
    normed = ops.rms_norm(x, weight, 1e-6)
    _, added = ops.add_norm(x, torch.zeros_like(x), ops.RmsNorm(weight, 1e-6))
    for got in (normed, added):
        torch.testing.assert_close(got.float(), want, rtol=1e-2, atol=1e-2)


def test_a_row_of_a_norm_does_not_depend_on_the_others() -> None:
    x, weight = noise(300, 512, dtype=torch.bfloat16), noise(512, dtype=torch.bfloat16)
    assert torch.equal(ops.rms_norm(x, weight, 1e-6)[17:18], ops.rms_norm(x[17:18], weight, 1e-6))
