"""The cases can fail: dropping any one feature of a network changes its logits visibly.

Without this, a window wider than the prompt or a norm of ones would leave its feature untested everywhere.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from quire.attention.base import ragged
from quire.attention.reference import Reference
from quire.attention.shapes import block_bytes
from quire.attention.states import state_bytes
from quire.checkpoint.files import read_config
from quire.checkpoint.reader import Checkpoint
from quire.layers.decoder import Decoder
from quire.models.names import Names
from quire.models.registry import decoder_spec
from quire.models.spec import Attention, attention_of
from quire.models.spec import Decoder as Spec
from tests.models.case import comparable
from tests.models.cases import CASES, Case, build_hf, prompt
from tests.models.mutations import mutations

BLOCK_SIZE, NUM_TOKENS = 4, 40
SAME, VISIBLE = 2e-4, 2e-3  # the first is what oracle tests tolerate
LARGE = (
    16.0  # logits beyond this have proportionally larger float32 rounding (Gemma's, by its scaled embedding)
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@torch.inference_mode()
def test_every_feature_shows_in_the_logits(case: Case, tmp_path: Path) -> None:
    tokens = prompt(NUM_TOKENS)
    theirs = build_hf(comparable(case), tmp_path)(torch.tensor([tokens])).logits[0]
    spec, names = decoder_spec(read_config(tmp_path))
    allowed = SAME * max(1.0, theirs.abs().max().item() / LARGE)
    assert far(logits(spec, names, tmp_path, tokens), theirs) < allowed
    dropped = {what: far(logits(less, names, tmp_path, tokens), theirs) for what, less in mutations(spec)}
    assert len(dropped) >= 3
    assert {what: distance for what, distance in dropped.items() if not distance > VISIBLE} == {}


def logits(spec: Spec, names: Names, folder: Path, tokens: list[int]) -> Tensor:
    decoder = Decoder(spec, backend=Reference(BLOCK_SIZE), dtype=torch.float32)
    decoder.load(Checkpoint(folder, names))
    num_blocks = -(-len(tokens) // BLOCK_SIZE)
    pool = torch.zeros(num_blocks, block_bytes(spec, BLOCK_SIZE, torch.float32.itemsize), dtype=torch.uint8)
    states = torch.zeros(1, state_bytes(spec, torch.float32.itemsize), dtype=torch.uint8)
    caches, found = decoder.caches(pool, states), []
    at_once = chunk_of(spec) or len(tokens)
    for start in range(0, len(tokens), at_once):
        some = torch.tensor(tokens[start : start + at_once])
        step = ragged([start], [len(some)], [list(range(num_blocks))], BLOCK_SIZE)
        found.append(decoder.logits(decoder(some, step, caches)))
    return torch.cat(found)


def chunk_of(spec: Spec) -> int | None:
    """Positions within whose multiples a step stays."""
    attention = [attention_of(block.mixer) for block in spec.blocks]
    return next((a.chunk for a in attention if isinstance(a, Attention) and a.chunk), None)


def far(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()
