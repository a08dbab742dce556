"""Every registered kernel against its reference, over shapes and dtypes; Triton's on the CPU if need be."""

import ctypes
import importlib
import importlib.util
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from quire.kernels import ops
from quire.kernels.cpu import native
from quire.kernels.cpu.ops import PackedWeight
from quire.kernels.dispatch import Kernel, Op, op

if importlib.util.find_spec("triton") is not None:
    importlib.import_module("tests.interpreter")
    importlib.import_module(
        "quire.kernels.triton.ops"
    )  # registers kernels for GPUs, whether there is one or not

GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # the latter: in Triton's interpreter
OPS = [value for name in ops.__all__ if isinstance(value := getattr(ops, name), Op)]
REGISTERED = [(o, device, dtype) for o in OPS for device, dtype in o.kernels]
TOLERANCE = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # an erf near -1 loses digits
MOST_INTERPRETED = 40  # rows; the interpreter takes milliseconds for each
Inputs = Iterator[tuple[object, ...]]


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 2.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


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


def products(dtype: torch.dtype) -> Inputs:
    for rows, inputs, outputs in ((1, 64, 48), (8, 96, 130), (40, 33, 7), (0, 64, 48)):
        x, weight = (
            noise(rows, inputs, dtype=dtype, scale=0.5),
            noise(outputs, inputs, dtype=dtype, seed=1, scale=0.1),
        )
        for bias in (None, noise(outputs, dtype=dtype, seed=2)):
            yield x, ops.pack_linear(weight), bias
            yield x, ops.pack_linear(weight), bias, torch.float32
            yield x, weight, bias
    for inputs in (64, 40):  # a weight per head, and heads further apart than they are long
        x, weight = noise(9, 3, 96, dtype=dtype), noise(3, 70, inputs, dtype=dtype, seed=1, scale=0.1)
        yield x[..., :inputs], ops.pack_linear(weight), None
        yield x[..., :inputs], weight, None
    yield noise(5, 3, 64, dtype=dtype), ops.pack_linear(noise(8, 64, dtype=dtype, scale=0.1)), None
    yield noise(5, 96, dtype=dtype)[:, 32:], ops.pack_linear(noise(8, 64, dtype=dtype, scale=0.1)), None


def weights(dtype: torch.dtype) -> Inputs:
    yield (noise(64, 48, dtype=dtype),)
    yield (noise(7, 33, dtype=dtype),)
    yield (noise(3, 16, 40, dtype=dtype).transpose(1, 2),)


INPUTS: dict[str, Callable[[torch.dtype], Inputs]] = {
    "rms_norm": norms,
    "layer_norm": layer_norms,
    "norm_rope": ropes,
    "act": gates,
    "act_mul": gates,
    "linear": products,
    "pack_linear": weights,
}


def plain(x: object) -> object:
    """A packed weight as the tensor it was; anything else as it is."""
    if not isinstance(x, PackedWeight):
        return x
    rows = x.data.transpose(2, 3).flatten(3).flatten(1, 2)[:, : x.outputs, : x.inputs]
    return rows if x.groups > 1 else rows[0]


def copy(x: object) -> object:
    return x.clone() if isinstance(x, Tensor) else x


def moved(x: object, device: torch.device) -> object:
    """x on the device, a view as far apart as it was."""
    if not isinstance(x, Tensor) or x.device == device:
        return x
    there = torch.zeros(x.untyped_storage().nbytes() // x.itemsize, dtype=x.dtype, device=device)
    return there.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)


def check(o: Op, kernel: Kernel, inputs: Inputs, dtype: torch.dtype, device: torch.device) -> None:
    for args in inputs:
        args = tuple(moved(x, device) for x in args)
        want = o.reference(*[copy(plain(x)) for x in args])
        got = plain(kernel(*args))
        assert isinstance(got, Tensor) and got.dtype == want.dtype and got.shape == want.shape
        size = want.float().abs().clamp(min=1)
        same = (got == want) | (got.isnan() & want.isnan())  # infinities, too
        error = ((got.float() - want.float()).abs() / size).masked_fill(same, 0).nan_to_num(torch.inf)
        assert error.numel() == 0 or error.max() <= TOLERANCE[dtype], [getattr(x, "shape", x) for x in args]


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
        inputs = (args for args in inputs if isinstance(args[0], Tensor) and len(args[0]) <= MOST_INTERPRETED)
    check(o, o.kernels[device, dtype], inputs, dtype, where)


@pytest.mark.skipif(native.load()[0] is None, reason="the C++ kernels are not built")
@pytest.mark.parametrize("level", range(native.isa() + 1))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_instruction_set_computes_the_same(level: int, dtype: torch.dtype) -> None:
    library = native.load()[0]
    assert isinstance(library, ctypes.CDLL)
    bf16, rows, size = dtype is torch.bfloat16, 3, 70
    x, weight = noise(rows, size, dtype=dtype), noise(size, dtype=dtype, seed=1)
    out = torch.empty_like(x)
    pointers = (out.data_ptr(), x.data_ptr(), weight.data_ptr())
    library.quire_rms_norm(level, 1, bf16, *pointers, rows, size, size, 1e-6, 0.5)
    want = ops.rms_norm.reference(x, weight, 1e-6, 0.5)
    torch.testing.assert_close(out, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    half = torch.empty(rows, size // 2, dtype=dtype)
    library.quire_act(level, 1, bf16, half.data_ptr(), x.data_ptr(), rows, size // 2, 0, True)
    want = ops.act_mul.reference(x, "silu")
    torch.testing.assert_close(half, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.skipif(native.load()[0] is None, reason="the C++ kernels are not built")
@pytest.mark.parametrize("level", range(native.isa() + 1))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_is_the_same_bits_for_any_number_of_rows(level: int, dtype: torch.dtype) -> None:
    library = native.load()[0]
    assert isinstance(library, ctypes.CDLL)
    inputs, outputs, size = 352, 200, dtype.itemsize
    x, dense = noise(130, inputs, dtype=dtype), noise(outputs, inputs, dtype=dtype, seed=1, scale=0.1)
    weight = ops.pack_linear(dense)

    def product(x: Tensor, threads: int) -> Tensor:
        out = torch.empty(len(x), outputs)
        kind = (level, threads, dtype is torch.bfloat16, False)
        pointers = (out.data_ptr(), x.data_ptr(), weight.data.data_ptr(), None)
        library.quire_linear(*kind, *pointers, len(x), outputs, inputs * size // 4, x.stride(0) * size, 1, 0)
        return out

    whole = product(x, 1)
    torch.testing.assert_close(whole.double(), x.double() @ dense.double().T, rtol=0, atol=1e-4)
    for rows in (1, 2, 3, 5, 6, 7, 15, 16, 17, 31, 32, 33, 64, 97):
        assert torch.equal(product(x[-rows:], 1), whole[-rows:]), rows
    assert torch.equal(product(x, 3), whole)


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


def test_a_row_of_a_norm_does_not_depend_on_the_others() -> None:
    x, weight = noise(300, 512, dtype=torch.bfloat16), noise(512, dtype=torch.bfloat16)
    assert torch.equal(ops.rms_norm(x, weight, 1e-6)[17:18], ops.rms_norm(x[17:18], weight, 1e-6))
