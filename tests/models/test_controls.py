"""The cases can fail: dropping any one feature of a network changes its logits visibly.

Without this, a window wider than the prompt or a norm of ones would leave its feature untested everywhere.
"""

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

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
from quire.models.spec import Attention, attention_of, has_axes
from quire.models.spec import Decoder as Spec
from quire.scheduler.spans import Spans
from tests.models.case import comparable
from tests.models.cases import CASES, Case, build_hf, prompt
from tests.models.mutations import DROPS, mutations

BLOCK_SIZE, NUM_TOKENS = 4, 40
SAME, VISIBLE = 2e-4, 2e-3  # the first is what oracle tests tolerate
# Fields that say which parameters there are, or how large: no checkpoint fits a spec without them. And parts, whose own
# fields have controls.
SHAPES = {
    "Rope": "dim",  # see "rope of a part"
    "Growth": "rate length first",  # see "growth"
    "Attention": "num_heads num_kv_heads head_dim inputs q_rank qk_norm_span v_dim keys_as_values gate_per_head",
    "Indexer": "num_heads head_dim own",  # see "indexers of layers"
    "MLA": "num_heads q_rank kv_rank nope_dim rope_dim v_dim norm",
    "ShortConv": "width",
    "DeltaNet": "num_k_heads num_v_heads k_dim v_dim width norm",
    "KimiDelta": "num_heads head_dim width norm rank",
    "Lightning": "num_heads head_dim norm",
    "Mamba": "channels num_heads state_dim step_rank width",
    "Mamba2": "num_heads head_dim state_dim groups width",
    "RGLRU": "channels num_heads width",
    "Both": "attention states",
    "MLP": "hidden gated",
    "Apart": "norm",
    "MoE": "num_experts expert held",
    "Guided": "attention mlp states norm",
    "LayerEmbedding": "dim norm",
    "AltUp": "num rank norm",
    "Block": "mixer mlp attn_norm mlp_norm altup",
    "Decoder": "vocab_size dim max_length blocks norm layer_rows tied",
}
LARGE = (
    16.0  # logits beyond this have proportionally larger float32 rounding (Gemma's, by its scaled embedding)
)


def test_every_field_has_a_control() -> None:
    controls = {(kind, name.split()[0].split("[")[0]) for kind, drops in DROPS.items() for name in drops}
    left = {}
    for kind in parts_of(Spec):
        names = [field.name for field in fields(kind) if (kind, field.name) not in controls]
        left |= {kind.__name__: " ".join(names)} if names else {}
    assert left == SHAPES


def parts_of(kind: object) -> set[type]:
    """Every dataclass that a spec may hold."""
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return set().union(*map(parts_of, get_args(kind)))
    return {kind}.union(*map(parts_of, get_type_hints(kind).values()))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@torch.inference_mode()
def test_every_feature_shows_in_the_logits(case: Case, tmp_path: Path) -> None:
    tokens, model = prompt(NUM_TOKENS), build_hf(comparable(case), tmp_path)
    spec, names = decoder_spec(read_config(tmp_path))
    at = torch.arange(NUM_TOKENS) // torch.tensor([[3], [2], [1]]) if has_axes(spec) else None  # [3, T]
    more = {} if at is None else {"position_ids": at[:, None]}
    theirs = model(torch.tensor([tokens]), **more).logits[0]
    allowed = SAME * max(1.0, theirs.abs().max().item() / LARGE)
    assert far(logits(spec, names, tmp_path, tokens, at), theirs) < allowed
    dropped = {what: far(logits(less, names, tmp_path, tokens, at), theirs) for what, less in mutations(spec)}
    assert len(dropped) >= 3
    assert {what: distance for what, distance in dropped.items() if not distance > VISIBLE} == {}


def logits(
    spec: Spec,
    names: Names,
    folder: Path,
    tokens: list[int],
    coordinates: Tensor | None = None,
    spans: Spans = (),
) -> Tensor:
    """`coordinates` [3, T]: of the tokens, if they are not one after another. Those of `spans` see each other."""
    decoder = Decoder(spec, backend=Reference(BLOCK_SIZE), dtype=torch.float32)
    decoder.load(Checkpoint(folder, names))
    num_blocks = -(-len(tokens) // BLOCK_SIZE)
    pool = torch.zeros(num_blocks, block_bytes(spec, BLOCK_SIZE, torch.float32.itemsize), dtype=torch.uint8)
    states = torch.zeros(1, state_bytes(spec, torch.float32.itemsize), dtype=torch.uint8)
    caches, found = decoder.caches(pool, states), []
    at_once = chunk_of(spec) or len(tokens)
    for start in range(0, len(tokens), at_once):
        some = torch.tensor(tokens[start : start + at_once])
        step = ragged([start], [len(some)], [list(range(num_blocks))], BLOCK_SIZE, spans=[spans])
        if coordinates is not None:
            step = replace(step, coordinates=coordinates[:, start : start + at_once])
        found.append(decoder.logits(decoder(some, step, caches)))
    return torch.cat(found)


def chunk_of(spec: Spec) -> int | None:
    """Positions within whose multiples a step stays."""
    attention = [attention_of(block.mixer) for block in spec.blocks]
    return next((a.chunk for a in attention if isinstance(a, Attention) and a.chunk), None)


def far(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()
