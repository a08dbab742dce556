"""Mixers that keep a state: a sequence in chunks and among others computes what it computes alone, in one go."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quire.attention.base import Backend, ragged
from quire.attention.cpu import Cpu
from quire.attention.reference import Reference
from quire.attention.shapes import block_bytes
from quire.attention.states import state_bytes
from quire.checkpoint.files import read_config
from quire.checkpoint.reader import Checkpoint
from quire.layers.decoder import Decoder
from quire.models.registry import decoder_spec
from tests.models.cases import BY_NAME, build_hf, prompt

NAMES = (
    "Lfm2",
    "Qwen3Next",
    "KimiLinear",
    "BailingHybrid",
    "BailingMoeLinearV2",
    "MiniMax",
    "Mamba2",
    "Jamba",
    "FalconH1",
    "Zamba",
    "Zamba2",
    "RecurrentGemma",
    # every kind of mixer that keeps a state; and networks of which torch computes a part
    "Gemma3n",
    "Gemma4",
    "Gemma4-experts",
)
LENGTHS = (24, 9, 1, 17)
NUM_ROWS, NUM_BLOCKS = 7, 64
BACKENDS: list[Backend] = [
    b for b in (Reference(4), Cpu()) if b.why_not(torch.float32, torch.device("cpu")) is None
]
NEAR = 5e-5  # where products are torch's; of our kernels, equal to the bit


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    build_hf(BY_NAME[request.param], folder)
    return folder


def load(folder: Path, backend: Backend) -> Decoder:
    spec, names = decoder_spec(read_config(folder))
    decoder, checkpoint = Decoder(spec, backend=backend, dtype=torch.float32), Checkpoint(folder, names)
    decoder.load(checkpoint)
    assert checkpoint.unused() == []
    return decoder


def compute(decoder: Decoder, prompts: list[list[int]], least: int, most: int, seed: int = 0) -> list[Tensor]:
    """Logits of all positions: random ones of the sequences in each step, `least` to `most` positions of each."""
    rng, own_size = random.Random(seed), decoder.backend.block_size
    pool = torch.full((NUM_BLOCKS, block_bytes(decoder.share, own_size, 4)), 255, dtype=torch.uint8)
    size = own_size * decoder.axes.cp.size
    states = torch.full((NUM_ROWS, state_bytes(decoder.share, 4)), 255, dtype=torch.uint8)  # NaN
    rows = rng.sample(range(NUM_ROWS), len(prompts))
    states[rows] = 0
    caches, free = decoder.caches(pool, states), rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    tables = [[free.pop() for _ in range(-(-len(p) // size))] for p in prompts]
    done, parts = [0] * len(prompts), [[] for _ in prompts]
    while left := [s for s, p in enumerate(prompts) if done[s] < len(p)]:
        chosen = rng.sample(left, rng.randint(1, len(left)))
        counts = [min(rng.randint(least, most), len(prompts[s]) - done[s]) for s in chosen]
        ids = [t for s, n in zip(chosen, counts, strict=True) for t in prompts[s][done[s] : done[s] + n]]
        step = ragged([done[s] for s in chosen], counts, [tables[s] for s in chosen], size)
        step = replace(step, rows=torch.tensor([rows[s] for s in chosen]))
        hidden = decoder(torch.tensor(ids), step, caches)
        is_last = decoder.stage.is_last
        logits = decoder.vocabulary.gather(decoder.logits(hidden)) if is_last else hidden
        for s, part in zip(chosen, logits.split(counts), strict=True):
            parts[s].append(part)
            done[s] += len(part)
    others = [row for row in range(NUM_ROWS) if row not in rows]
    assert (states[others] == 255).all()  # whose states these are, nobody has touched
    return [torch.cat(p) for p in parts]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_a_state_is_carried_from_chunk_to_chunk(folder: Path, backend: Backend) -> None:
    decoder = load(folder, backend)
    prompts = [prompt(n, seed=n) for n in LENGTHS]
    whole = [compute(decoder, [p], len(p), len(p))[0] for p in prompts]
    for most, seed in ((1, 1), (3, 2), (3, 3), (24, 4)):
        for got, want in zip(compute(decoder, prompts, 1, most, seed), whole, strict=True):
            near = 0.0 if backend.name == "cpu" else NEAR
            torch.testing.assert_close(got, want, rtol=near, atol=near * want.abs().max().item())
