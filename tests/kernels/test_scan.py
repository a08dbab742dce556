"""Operations with a state of each sequence: results and states, whatever the batch, the chunks and the machine."""

import pytest
import torch
from torch import Tensor

from quire.kernels import ops
from quire.kernels.cpu import native
from quire.kernels.cpu.calls import kernel
from quire.kernels.dispatch import Op
from tests.kernels.sequences import NUM_ROWS, convolutions, layout, noise, scans
from tests.kernels.test_kernels import TOLERANCE

pytestmark = pytest.mark.skipif(native.load()[0] is None, reason="the C++ kernels are not built")
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def compare(o: Op, args: tuple[object, ...], at: int, limit: float) -> None:
    """Results and states, of which argument `at` is one."""
    found = [[x.clone() if i == at else x for i, x in enumerate(args)] for _ in range(2)]
    got, want = o(*found[0]), o.reference(*found[1])
    used = int(args[at + 2][-1])
    assert got.dtype is want.dtype and got[used:].eq(0).all()
    torch.testing.assert_close(got[:used], want[:used], rtol=limit, atol=limit)
    torch.testing.assert_close(found[0][at], found[1][at], rtol=limit, atol=limit)


@BOTH
def test_convolutions_and_their_states(dtype: torch.dtype) -> None:
    for args in convolutions(dtype):
        compare(ops.causal_conv, args, 3, TOLERANCE[dtype])


def test_scans_and_their_states() -> None:
    for args in scans(torch.float32):
        compare(ops.selective_scan, args, 6, 2e-5)


@BOTH
def test_a_convolution_is_the_same_bits_in_chunks_and_among_others(dtype: torch.dtype) -> None:
    channels, width, length = 70, 4, 21
    x, weight = noise(length, channels, dtype=dtype), noise(channels, width, dtype=dtype, seed=1)

    def some(begin: int, end: int, states: Tensor, before: int, after: int) -> Tensor:
        """A chunk of the sequence, between two others."""
        others = [noise(n, channels, dtype=dtype, seed=9) for n in (before, after)]
        rows, starts = torch.tensor([1, 4, 2]), torch.tensor([0, before, end - begin, after]).cumsum(0).int()
        inputs = torch.cat((others[0], x[begin:end], others[1]))
        y = ops.causal_conv(inputs, weight, None, states, rows, starts, True)
        return y[before : before + end - begin]

    whole, parts = (torch.zeros(NUM_ROWS, channels, width - 1, dtype=dtype) for _ in range(2))
    want = some(0, length, whole, 0, 0)
    got = [some(*chunk, parts, *beside) for chunk, beside in CHUNKS]
    assert torch.equal(torch.cat(got), want) and torch.equal(parts[4], whole[4])


CHUNKS = (((0, 1), (3, 2)), ((1, 3), (0, 90)), ((3, 17), (1, 0)), ((17, 20), (5, 5)), ((20, 21), (0, 1)))


def test_a_scan_is_the_same_bits_in_chunks_and_among_others() -> None:
    channels, size, length = 70, 16, 21
    rate, skip = -noise(size, channels, seed=3).exp(), noise(channels, seed=4)

    def inputs(n: int, seed: int) -> list[Tensor]:
        wide = [noise(n, channels, seed=seed), noise(n, channels, seed=seed + 1).abs()]
        return wide + [noise(n, size, seed=seed + k) for k in (2, 3)]

    mine = inputs(length, 10)

    def some(begin: int, end: int, states: Tensor, before: int, after: int) -> Tensor:
        rows, starts = torch.tensor([1, 4, 2]), torch.tensor([0, before, end - begin, after]).cumsum(0).int()
        parts = zip(inputs(before, 20), (part[begin:end] for part in mine), inputs(after, 30), strict=True)
        x, dt, b, c = (torch.cat(part) for part in parts)
        y = ops.selective_scan(x, dt, rate, b, c, skip, states, rows, starts)
        return y[before : before + end - begin]

    whole, parts = (torch.zeros(NUM_ROWS, size, channels) for _ in range(2))
    want = some(0, length, whole, 0, 0)
    got = [some(*chunk, parts, *beside) for chunk, beside in CHUNKS]
    assert torch.equal(torch.cat(got), want) and torch.equal(parts[4], whole[4])


@pytest.mark.parametrize("level", range(native.isa() + 1))
@pytest.mark.parametrize("threads", [1, 3])
def test_every_instruction_set_computes_the_same(level: int, threads: int) -> None:
    counts, channels, width, size = (700, 0, 300), 70, 4, 6  # so many that threads share them
    rows, starts = layout(counts)
    x, weight, state = noise(1003, channels), noise(channels, width, seed=1), noise(NUM_ROWS, channels, 3)
    out, states = torch.empty_like(x), state.clone()
    pointers = (out, x, weight, None, states, rows, starts)
    kernel("quire_causal_conv")(
        *(level, threads, False, True, *(0 if p is None else p.data_ptr() for p in pointers)),
        *(len(rows), len(x), channels, width, channels, states.stride(0)),
    )
    want = ops.causal_conv.reference(x, weight, None, state, rows, starts, True)
    torch.testing.assert_close(out, want, rtol=2e-5, atol=2e-5)
    assert torch.equal(states, state)

    dt, rate, skip = (
        noise(1003, channels, seed=2).abs(),
        -noise(size, channels).exp(),
        noise(channels, seed=4),
    )
    b, c, state = noise(1003, size, seed=5), noise(1003, size, seed=6), noise(NUM_ROWS, size, channels)
    states = state.clone()
    pointers = (out, x, dt, rate, b, c, skip, states, rows, starts)
    kernel("quire_selective_scan")(
        *(level, threads, *(p.data_ptr() for p in pointers)),
        *(len(rows), len(x), channels, size, channels, channels, size, size, states.stride(0)),
    )
    want = ops.selective_scan.reference(x, dt, rate, b, c, skip, state, rows, starts)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states, state, rtol=1e-4, atol=1e-4)
