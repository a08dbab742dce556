"""Layers that keep a state: a sequence in chunks, among others, gives what it gives alone and at once."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quire.attention.base import Cache, layer_caches, ragged
from quire.attention.reference import Reference
from quire.attention.shapes import block_bytes
from quire.attention.states import state_bytes
from quire.layers.base import Build
from quire.layers.block import mixer
from quire.layers.norm import Normed
from quire.layers.rope import RopeTables
from quire.models.parameters import block_shapes
from quire.models.spec import RGLRU, Attention, Block, Both, Decoder, Mamba, Mamba2, Mixer, Norm, ShortConv

DIM, LENGTHS, BLOCK_SIZE, TABLE_BLOCKS = 40, (23, 1, 9), 4, 6
STEPS = ((5, 1, 0), (0, 0, 1), (1, 0, 3), (17, 0, 5))  # rows of each sequence in each step
TABLES = [[s * TABLE_BLOCKS + i for i in range(TABLE_BLOCKS)] for s in range(len(LENGTHS))]
STATES = Mamba2(num_heads=6, head_dim=8, state_dim=12, groups=3, width=4, norm=Norm(), bias=True)
MIXERS = (
    ShortConv(width=3, bias=True),
    Mamba(channels=56, state_dim=12, step_rank=7, width=4),
    Mamba(channels=56, state_dim=12, step_rank=7, width=3, norm=Norm(), bias=True, conv_bias=False),
    Mamba(channels=56, num_heads=4, state_dim=12, step_rank=7, width=4),
    RGLRU(channels=56, num_heads=7, width=4, act="gelu_pytorch_tanh"),
    STATES,
    Both(
        attention=Attention(num_heads=3, num_kv_heads=1, head_dim=16, rope=None),
        states=replace(STATES, norm_first=True, scales=(0.5, 0.6, 0.7, 0.8, 0.9)),
        attention_scale=0.3,
    ),
)
by_mixer = pytest.mark.parametrize("s", MIXERS, ids=lambda s: type(s).__name__)


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


class Layer:
    """A mixer, its weights, and memory for every sequence."""

    def __init__(self, s: Mixer, dtype: torch.dtype = torch.float32):
        backend, device = Reference(BLOCK_SIZE), torch.device("cpu")
        build = Build(DIM, dtype, device, backend, RopeTables(64, device))
        self.mixer = mixer(s, build)
        with build.upload:
            self.mixer.load(Weights(s), "mixer")
        block = Block(mixer=s, mlp=None, attn_norm=None, mlp_norm=None)
        network = Decoder(vocab_size=1, dim=DIM, max_length=64, blocks=(block,), norm=Norm())
        self.sizes = block_bytes(network, BLOCK_SIZE, dtype.itemsize), state_bytes(network, dtype.itemsize)
        self.views = lambda pool, states: layer_caches(backend, network, pool, states, dtype)[0]

    def cache(self) -> Cache:
        """Empty."""
        per_block, per_row = self.sizes
        pool = torch.zeros(len(TABLES) * TABLE_BLOCKS, per_block, dtype=torch.uint8)
        found: Cache = self.views(pool, torch.zeros(len(TABLES), per_row, dtype=torch.uint8))
        return found

    def __call__(self, x: Tensor, starts: list[int], counts: list[int], cache: Cache) -> Tensor:
        step = ragged(starts, counts, TABLES[: len(starts)], BLOCK_SIZE)
        y: Tensor = self.mixer.out(self.mixer.heads(Normed(x), step, cache))
        return y


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, DIM, generator=generator) for n in LENGTHS]


def chunks(whole: list[Tensor]) -> Iterator[tuple[list[int], list[int], Tensor]]:
    """(where each sequence goes on, by how many rows, those rows of all)."""
    done = [0] * len(whole)
    for counts in STEPS:
        ends = [a + n for a, n in zip(done, counts, strict=True)]
        yield done, list(counts), torch.cat([x[a:b] for x, a, b in zip(whole, done, ends, strict=True)])
        done = ends
    assert done == list(LENGTHS)


@by_mixer
@torch.inference_mode()
def test_chunks_among_others_give_what_a_sequence_gives_alone(s: Mixer) -> None:
    layer, cache = Layer(s), Layer(s).cache()
    found: list[list[Tensor]] = [[] for _ in LENGTHS]
    for starts, counts, x in chunks(inputs()):
        for mine, part in zip(found, layer(x, starts, counts, cache).split(counts), strict=True):
            mine.append(part)
    for x, got in zip(inputs(), found, strict=True):
        alone = layer(x, [0], [len(x)], layer.cache())
        torch.testing.assert_close(torch.cat(got), alone, rtol=1e-5, atol=1e-5)


@by_mixer
@torch.inference_mode()
def test_half_precision_stays_near(s: Mixer) -> None:
    x, half = inputs()[0], torch.bfloat16
    exact, rough = Layer(s), Layer(s, half)
    want, got = exact(x, [0], [len(x)], exact.cache()), rough(x.to(half), [0], [len(x)], rough.cache())
    assert got.dtype is half
    assert (got.float() - want).norm() / want.norm() < 0.05
