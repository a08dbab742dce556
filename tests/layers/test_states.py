"""Layers that keep a state: a sequence in chunks, among others, gives what it gives alone and at once."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from quire.attention.base import ragged
from quire.attention.reference import Reference
from quire.attention.states import Part, State, state_parts
from quire.layers.base import Build
from quire.layers.block import mixer
from quire.layers.norm import Normed
from quire.layers.rope import RopeTables
from quire.models.parameters import block_shapes
from quire.models.spec import RGLRU, Block, Mamba, Mamba2, Mixer, Norm, ShortConv

DIM, LENGTHS, BLOCK_SIZE = 40, (23, 1, 9), 4
STEPS = ((5, 1, 0), (0, 0, 1), (1, 0, 3), (17, 0, 5))  # rows of each sequence in each step
MIXERS = (
    ShortConv(width=3, bias=True),
    Mamba(channels=56, state_dim=12, step_rank=7, width=4),
    Mamba(channels=56, state_dim=12, step_rank=7, width=3, norm=Norm(), bias=True, conv_bias=False),
    RGLRU(channels=56, num_heads=7, width=4, act="gelu_pytorch_tanh"),
    Mamba2(num_heads=6, head_dim=8, state_dim=12, groups=3, width=4, norm=Norm(), bias=True),
)


class Weights:
    """Random ones by name."""

    def __init__(self, s: Mixer) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = block_shapes(Block(mixer=s, mlp=None, attn_norm=None, mlp_norm=None), DIM)
        self.found = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes}

    def __contains__(self, name: str) -> bool:
        return name in self.found

    def tensor(self, name: str, *, shape: tuple[int, ...], rows: slice | None = None) -> Tensor:
        assert self.found[name].shape == shape
        return self.found[name]


def rows(parts: tuple[Part, ...], count: int) -> State:
    return tuple(torch.zeros(count, *part.shape) for part in parts)


def loaded(s: Mixer, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    build = Build(DIM, dtype, torch.device("cpu"), Reference(BLOCK_SIZE), RopeTables(64, torch.device("cpu")))
    layer: torch.nn.Module = mixer(s, build)
    with build.upload:
        layer.load(Weights(s), "mixer")
    return layer


def chunks(inputs: list[Tensor]) -> Iterator[tuple[list[int], list[int], Tensor]]:
    """(where each sequence goes on, by how many rows, those rows of all)."""
    done = [0] * len(inputs)
    for counts in STEPS:
        ends = [a + n for a, n in zip(done, counts, strict=True)]
        yield (
            done.copy(),
            list(counts),
            torch.cat([x[a:b] for x, a, b in zip(inputs, done, ends, strict=True)]),
        )
        done = ends
    assert done == list(LENGTHS)


@pytest.mark.parametrize("s", MIXERS, ids=lambda s: type(s).__name__)
@torch.inference_mode()
def test_chunks_among_others_give_what_a_sequence_gives_alone(s: Mixer) -> None:
    layer, parts = loaded(s), state_parts(s, DIM)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(n, DIM, generator=generator) for n in LENGTHS]
    alone = []
    for x in inputs:
        step = ragged([0], [len(x)], [[0]], len(x))
        alone.append(layer.out(layer.heads(Normed(x), step, rows(parts, 1))))
    states, found = rows(parts, len(inputs)), [[] for _ in inputs]
    for starts, counts, x in chunks(inputs):
        step = ragged(starts, counts, [list(range(8))] * len(inputs), BLOCK_SIZE)
        y = layer.out(layer.heads(Normed(x), step, states))
        for mine, part in zip(found, y.split(counts), strict=True):
            mine.append(part)
    for got, want in zip(found, alone, strict=True):
        torch.testing.assert_close(torch.cat(got), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("s", MIXERS, ids=lambda s: type(s).__name__)
@torch.inference_mode()
def test_half_precision_stays_near(s: Mixer) -> None:
    parts, x = state_parts(s, DIM), torch.randn(LENGTHS[0], DIM, generator=torch.Generator().manual_seed(1))
    step = ragged([0], [len(x)], [[0]], len(x))
    want, got = (
        layer.out(layer.heads(Normed(x.to(dtype)), step, rows_of(parts, dtype)))
        for dtype in (torch.float32, torch.bfloat16)
        for layer in [loaded(s, dtype)]
    )
    assert got.dtype is torch.bfloat16
    assert (got.float() - want).norm() / want.norm() < 0.05


def rows_of(parts: tuple[Part, ...], dtype: torch.dtype) -> State:
    return tuple(torch.zeros(1, *p.shape, dtype=torch.float32 if p.exact else dtype) for p in parts)
