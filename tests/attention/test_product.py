"""Heads that a CPU's product finishes: turned and stored as by separate operations, for a row among any number."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.attention.base import Product, Ragged, Turn, ragged, turn_and_write
from quire.attention.cpu import Cpu
from quire.attention.reference import Reference
from quire.attention.shapes import CacheShape
from quire.kernels import ops
from quire.kernels.cpu import native
from tests.kernels.test_kernels import noise, row_scale

pytestmark = pytest.mark.skipif(native.load()[0] is None, reason="the C++ kernels are not built")
LEVELS = range(native.isa() + 1)
KINDS = ("float32", "bfloat16", "int8", "int4")
NUM_HEADS, NUM_KV_HEADS, INPUTS, LENGTH = 4, 2, 96, 104
TABLE = list(range(-(-LENGTH // 16)))
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 8e-3}  # separate operations round twice


class Layer:
    """A product's heads of a sequence of LENGTH positions, and caches for them."""

    def __init__(self, kind: str, size: int, *, normed: bool = True, interleaved: bool = False):
        self.dtype, heads = (
            (torch.float32 if kind == "float32" else torch.bfloat16),
            NUM_HEADS + 2 * NUM_KV_HEADS,
        )
        weight = noise(heads * size, INPUTS, dtype=self.dtype, seed=1, scale=0.1)
        self.size = size
        self.weight: Any = (
            ops.quantize_linear(weight, int(kind[3:])) if kind.startswith("int") else ops.pack_linear(weight)
        )
        self.bias = noise(heads * size, dtype=self.dtype, seed=2) if normed else None
        self.x, self.scale = noise(LENGTH, INPUTS, dtype=self.dtype, scale=0.5), row_scale(LENGTH, 3)
        angles = noise(LENGTH, size // 2 - 11, seed=3)  # some of a head does not turn
        gains = noise(NUM_HEADS + NUM_KV_HEADS, size, seed=4) if normed else None
        self.turn = Turn(angles.cos(), angles.sin(), interleaved, gains, 1e-6)
        self.shape = CacheShape(NUM_KV_HEADS, size, size)

    def product(self, rows: slice) -> Product:
        scale = ops.RowScale(self.scale.squares[rows], self.scale.eps)
        return Product(self.x[rows], scale, self.weight, self.bias, self.size)

    def pool(self, backend: Cpu | Reference) -> Tensor:
        num_bytes = self.shape.num_bytes(16, self.dtype.itemsize, backend.quantized)
        return torch.zeros(len(TABLE), num_bytes, dtype=torch.uint8)

    def attend(self, backend: Cpu, pool: Tensor, first: int, count: int) -> Tensor:
        cache = backend.views(pool, 0, self.shape, self.dtype)
        product, step = self.product(slice(first, first + count)), ragged([first], [count], [TABLE], 16)
        return backend.attend_product(product, cache, self.turn, step, scale=0.1)


def close(got: Tensor, want: Tensor) -> None:
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error < LIMIT[want.dtype], error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("normed", "interleaved"), [(True, False), (False, False), (True, True)])
def test_heads_are_turned_and_stored(
    level: int, size: int, kind: str, normed: bool, interleaved: bool
) -> None:
    layer, backend = Layer(kind, size, normed=normed, interleaved=interleaved), Cpu(level=level)
    step = ragged([0], [LENGTH], [TABLE], 16)
    found = []
    for together in (True, False):
        pool = layer.pool(backend)
        cache, product = backend.views(pool, 0, layer.shape, layer.dtype), layer.product(slice(0, LENGTH))
        if together:
            q = backend.finish_heads(product, cache, layer.turn, step)
            assert q is not None
        else:
            q = turn_and_write(backend, cache, product.heads(), layer.turn, step)
        found.append((q, cache.k.view(layer.dtype), cache.v.view(layer.dtype)))
    for got, want in zip(*found, strict=True):
        close(got, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("quantized", [False, True], ids=["", "int8"])
def test_a_position_is_the_same_bits_for_any_chunks_and_threads(
    level: int, quantized: bool, kind: str
) -> None:
    layer, backend = Layer(kind, 128), Cpu(level=level, quantized=quantized)
    pool = layer.pool(backend)
    whole = layer.attend(backend, pool, 0, LENGTH)
    threads = torch.get_num_threads()
    for counts in ([1] * LENGTH, [5, 2, 90, 7], [33, 71], [LENGTH]):
        other, first = layer.pool(backend), 0
        torch.set_num_threads(3 if len(counts) == 1 else threads)
        try:
            for count in counts:
                got = layer.attend(backend, other, first, count)
                assert torch.equal(got, whole[first : first + count]), (first, count)
                first += count
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(other, pool)


@pytest.mark.parametrize("quantized", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("apart", [False, True], ids=["", "rows apart from positions"])
def test_it_is_what_the_reference_attends(apart: bool, quantized: bool) -> None:
    layer = Layer("float32", 64)
    if apart:
        layer.turn = dataclasses.replace(layer.turn, at=torch.arange(LENGTH).flip(0))
    found = []
    for backend in (Cpu(quantized=quantized), Reference(16, quantized=quantized)):
        cache = backend.views(layer.pool(backend), 0, layer.shape, layer.dtype)
        step = ragged([0], [LENGTH], [TABLE], 16)
        found.append(
            backend.attend_product(
                layer.product(slice(0, LENGTH)), cache, layer.turn, step, scale=0.1, window=50
            )
        )
    torch.testing.assert_close(*found, rtol=1e-2 if quantized else 1e-4, atol=1e-2 if quantized else 1e-5)


def test_padding_rows_are_stored_nowhere() -> None:
    layer, backend = Layer("float32", 64), Cpu()
    pools = [layer.pool(backend) for _ in range(2)]
    want = layer.attend(backend, pools[0], 0, 5)
    step = ragged([0], [5], [TABLE], 16)
    slots = torch.cat((step.slot_mapping, torch.full((4,), -1)))
    padded: Ragged = dataclasses.replace(step, positions=torch.arange(9), slot_mapping=slots)
    cache = backend.views(pools[1], 0, layer.shape, layer.dtype)
    got = backend.attend_product(layer.product(slice(0, 9)), cache, layer.turn, padded, scale=0.1)
    assert torch.equal(got[:5], want) and torch.equal(*pools)


def test_other_heads_take_several_operations() -> None:
    step = ragged([0], [LENGTH], [TABLE], 16)
    narrow, plain = Layer("float32", 48), Layer("float32", 64)
    plain.weight = noise(len(plain.bias), INPUTS, seed=1, scale=0.1)  # not packed
    for layer in (narrow, plain):
        backend, product = Cpu(), layer.product(slice(0, LENGTH))
        cache = backend.views(layer.pool(backend), 0, layer.shape, layer.dtype)
        assert backend.finish_heads(product, cache, layer.turn, step) is None
        got = backend.attend_product(product, cache, layer.turn, step, scale=0.1)
        want = backend.attend_turned(product.heads(), cache, layer.turn, step, scale=0.1)
        assert torch.equal(got, want)
