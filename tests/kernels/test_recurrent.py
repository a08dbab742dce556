"""Kernels that keep states against their reference: what is left of the states, and what company must not change."""

import importlib
import importlib.util
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quire.kernels import ops
from quire.kernels.cpu import native
from quire.kernels.cpu.calls import kernel
from quire.kernels.dispatch import Kernel
from tests.kernels.recurrences import CASES, CONVOLUTIONS, Sizes, Step, make, make_convolution
from tests.kernels.sequences import layout, noise, rows_among_others, scans

if importlib.util.find_spec("triton") is not None:
    importlib.import_module("tests.interpreter")
    importlib.import_module(
        "quire.kernels.triton.states"
    )  # registers kernels for GPUs, whether there is one or not

GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # the latter: in Triton's interpreter
KERNELS = [(device, dtype) for device, dtype in ops.recurrence.kernels if device != "meta"]
EACH_KERNEL = pytest.mark.parametrize(("device", "dtype"), KERNELS, ids=lambda x: str(x))
TOLERANCE = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ROUNDED = 5e-3  # what tensor cores make of chunks; the interpreter rounds nothing


def on(step: Step, device: torch.device) -> Step:
    """The step, its states in memory of their own."""
    moved = {name: x if x is None else x.to(device) for name, x in vars(step).items()}
    return Step(**{**moved, "state": step.state.clone().to(device)})


def run(compute: Kernel, step: Step, device: torch.device, in_chunks: bool = False) -> tuple[Tensor, Tensor]:
    """What the positions of sequences read, and all states afterwards."""
    there, used = on(step, device), int(step.query_starts[-1])
    y = compute(*there.arguments(), in_chunks)
    assert y[used:].eq(0).all()
    return y[:used].float().cpu(), there.state.cpu()


def place(device: str) -> torch.device:
    return GPU if device == "cuda" else torch.device(device)


@EACH_KERNEL
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_results_and_states_equal_the_references(device: str, dtype: torch.dtype, sizes: Sizes) -> None:
    step = make(replace(sizes, num_padding=3), dtype, torch.float32)
    want, left = run(ops.recurrence.reference, step, torch.device("cpu"))
    for in_chunks in (False, True):
        y, states = run(ops.recurrence.kernels[device, dtype], step, place(device), in_chunks)
        rounded = ROUNDED if in_chunks and place(device).type == "cuda" else 0.0
        near, exact = TOLERANCE[dtype] + rounded, 4e-6 + rounded
        torch.testing.assert_close(y, want, rtol=near, atol=near)
        torch.testing.assert_close(states, left, rtol=exact, atol=exact)
    others = [row for row in range(len(left)) if row not in step.rows.tolist()]
    assert torch.equal(states[others], step.state[others])


@EACH_KERNEL
def test_company_and_chunks_change_no_bit(device: str, dtype: torch.dtype) -> None:
    compute, where = ops.recurrence.kernels[device, dtype], place(device)
    step = make(Sizes((5, 24, 8), 4, 2, 32, 40, num_padding=2), dtype, dtype)
    y, states = run(compute, step, where)
    begin, end, row = 5, 29, step.rows[1:2]  # the second sequence's
    state, parts = step.state.clone(), []
    for first, last in ((begin, begin + 1), (begin + 1, begin + 4), (begin + 4, end)):
        parts_of = {name: vars(step)[name][first:last] for name in ("v", "q", "k", "decay", "beta")}
        alone = Step(**parts_of, state=state, rows=row, query_starts=torch.tensor([0, last - first]).int())
        part, state = run(compute, alone, where)
        parts.append(part)
    assert torch.equal(torch.cat(parts), y[begin:end])
    assert torch.equal(state[row], states[row])


@EACH_KERNEL
def test_a_step_of_no_sequences_leaves_all_as_it_is(device: str, dtype: torch.dtype) -> None:
    step = make(Sizes((0, 0), 2, 1, 16, 16, num_padding=2), dtype, dtype)
    _, states = run(ops.recurrence.kernels[device, dtype], step, place(device))
    assert torch.equal(states, step.state)


@pytest.mark.skipif(native.load()[0] is None, reason="the C++ kernels are not built")
@pytest.mark.parametrize("level", range(native.isa() + 1))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_instruction_set_computes_the_same(level: int, dtype: torch.dtype) -> None:
    for sizes in CASES:
        step, bf16 = make(sizes, dtype, dtype), dtype is torch.bfloat16
        want, left = run(ops.recurrence.reference, step, torch.device("cpu"))
        there, y = on(step, torch.device("cpu")), torch.empty(step.v.shape, dtype=dtype)
        beta = 0 if there.beta is None else there.beta.data_ptr()
        kernel("quire_recurrence")(
            *(level, 1, bf16, bf16, y.data_ptr(), there.v.data_ptr(), there.q.data_ptr(), there.k.data_ptr()),
            *(there.decay.data_ptr(), beta, there.state.data_ptr(), there.rows.data_ptr()),
            *(there.query_starts.data_ptr(), len(there.rows), len(y), sizes.heads, sizes.key_heads),
            *(sizes.dk, sizes.dv, there.decay.shape[2]),
            *(there.v.stride(0), there.q.stride(0), there.k.stride(0), there.state.stride(0)),
        )
        torch.testing.assert_close(y.float(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        torch.testing.assert_close(there.state, left, rtol=4e-6, atol=4e-6)


CONVOLVE = [(device, dtype) for device, dtype in ops.causal_conv.kernels if device != "meta"]


def convolved(
    compute: Kernel, args: tuple[Tensor | None, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """What the positions of sequences see, and all states afterwards."""
    there, used = [x if x is None else x.clone().to(device) for x in args], int(args[5][-1])
    y = compute(*there, True)
    assert y[used:].eq(0).all()
    return y[:used].float().cpu(), there[3].cpu()


@pytest.mark.parametrize(("device", "dtype"), CONVOLVE, ids=lambda x: str(x))
@pytest.mark.parametrize(("lengths", "channels", "width"), CONVOLUTIONS)
def test_a_convolution_and_its_states_equal_the_references(
    device: str, dtype: torch.dtype, lengths: tuple[int, ...], channels: int, width: int
) -> None:
    compute, where = ops.causal_conv.kernels[device, dtype], place(device)
    args = make_convolution(lengths, channels, width, dtype, bias=True, num_padding=3)
    y, states = convolved(compute, args, where)
    want, left = convolved(ops.causal_conv.reference, args, torch.device("cpu"))
    torch.testing.assert_close(y, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(states, left)


@pytest.mark.parametrize(("device", "dtype"), CONVOLVE, ids=lambda x: str(x))
def test_company_and_chunks_change_no_bit_of_a_convolution(device: str, dtype: torch.dtype) -> None:
    compute, where = ops.causal_conv.kernels[device, dtype], place(device)
    x, weight, bias, state, rows, starts = make_convolution((5, 4, 8), 40, 4, dtype, bias=True, num_padding=2)
    y, states = convolved(compute, (x, weight, bias, state, rows, starts), where)
    parts = []
    for first, last in ((5, 6), (6, 9)):
        alone = x[first:last], weight, bias, state, rows[1:2], torch.tensor([0, last - first]).int()
        part, state = convolved(compute, alone, where)
        parts.append(part)
    assert torch.equal(torch.cat(parts), y[5:9])
    assert torch.equal(state[rows[1]], states[rows[1]])


STRENGTHS = (0.0, 1.0)  # of keys' corrections: none, and all of a value


@pytest.mark.parametrize("strength", STRENGTHS)
def test_chunks_of_keys_that_are_all_alike(strength: float) -> None:
    """Where powers of what keys make of each other would be large, and decays leave nothing or all."""
    if "cuda" not in dict(KERNELS):
        pytest.skip("no other kernel computes in chunks")
    step = make(Sizes((64, 40), 2, 1, 32, 16), torch.float32, torch.float32)
    decay = torch.ones_like(step.decay)
    decay[80:83] = 0.0
    assert step.beta is not None
    beta = torch.full_like(step.beta, strength)
    alike = replace(step, k=step.k[:1].expand(104, -1, -1).contiguous(), decay=decay, beta=beta)
    y, states = run(ops.recurrence.kernels["cuda", torch.float32], alike, GPU, True)
    want, left = run(ops.recurrence.reference, alike, torch.device("cpu"))
    near = 10 * ROUNDED if GPU.type == "cuda" else 1e-5
    torch.testing.assert_close(y, want, rtol=near, atol=near)
    torch.testing.assert_close(states, left, rtol=near, atol=near)


@pytest.mark.skipif(("cuda", torch.float32) not in ops.selective_scan.kernels, reason="there is no Triton")
def test_a_scan_and_its_states_equal_the_references() -> None:
    compute = ops.selective_scan.kernels["cuda", torch.float32]
    for args in scans(torch.float32):
        there, alone = ([x.clone() for x in args] for _ in range(2))
        moved = [x.to(GPU) for x in there]
        moved[6] = args[6].clone().to(GPU)
        y, want = compute(*moved).cpu(), ops.selective_scan.reference(*alone)
        torch.testing.assert_close(y, want, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(moved[6].cpu(), alone[6], rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(("cuda", torch.float32) not in ops.selective_scan.kernels, reason="there is no Triton")
def test_company_and_chunks_change_no_bit_of_a_scan() -> None:
    compute = ops.selective_scan.kernels["cuda", torch.float32]
    (rows, starts), channels, size = layout((5, 4, 8)), 70, 16
    x, dt, b, c = (noise(17, n, seed=n + i) for i, n in enumerate((channels, channels, size, size)))
    rate, skip = -noise(size, channels, seed=3).exp(), noise(channels, seed=4)
    state = rows_among_others(size, channels)
    x, dt, rate, b, c, skip, state, rows, starts = (
        part.to(GPU) for part in (x, dt.abs(), rate, b, c, skip, state, rows, starts)
    )
    whole = state.clone()
    y, parts = compute(x, dt, rate, b, c, skip, whole, rows, starts), []
    for first, last in ((5, 6), (6, 9)):
        some = (part[first:last] for part in (x, dt))
        ends = torch.tensor([0, last - first], device=GPU).int()
        keys = (part[first:last] for part in (b, c))
        parts.append(compute(*some, rate, *keys, skip, state, rows[1:2], ends))
    assert torch.equal(torch.cat(parts), y[5:9])
    assert torch.equal(state[rows[1]], whole[rows[1]])
