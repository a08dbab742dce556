"""Transformers' modules that keep states do so over rows of ours, and a state that is lost is found out."""

from dataclasses import replace

import pytest
import torch

from quire.attention.base import Ragged, ragged
from quire.attention.states import layer_states, state_bytes
from quire.errors import UnsupportedModel
from quire.layers.hf import states
from quire.layers.hf.conformance import TOLERANCE, check
from quire.layers.hf.shrink import shrink
from quire.layers.hf.source import describe, hf_config
from quire.layers.hf.states import Piece, StateCache, Stateful, pieces
from quire.models.mamba import LONGEST
from quire.models.spec import Kept
from tests.layers.test_hf import Pieces, installed, lose_states, lost
from tests.models.foreign import config

# Matrices and windows; Mamba, whose modules forget between chunks, beside attention; windows and values in attention;
# and those that have ways of their own.
SOME = (
    "Qwen3NextForCausalLM",
    "JambaForCausalLM",
    "ZayaForCausalLM",
    "RecurrentGemmaForCausalLM",
    "RwkvForCausalLM",
    "xLSTMForCausalLM",
)
by_class = pytest.mark.parametrize("architecture", SOME)


def swapped(found: list[Piece]) -> list[Piece]:
    return [replace(piece, rows=piece.rows.flip(0)) for piece in found]


def mixed_up(found: list[Piece]) -> list[Piece]:
    """Each sequence is given the row of the next one."""
    return [replace(piece, rows=(piece.rows + 1) % 3) if not piece.begins else piece for piece in found]


@by_class
def test_pieces_in_batches_equal_whole_sequences(architecture: str) -> None:
    found = check(config(installed(architecture)))
    assert found.difference <= TOLERANCE
    assert not found.alone


@by_class
@pytest.mark.parametrize(
    "change",
    [lost, swapped, mixed_up],
)
def test_another_state_is_noticed(architecture: str, change: Pieces, monkeypatch: pytest.MonkeyPatch) -> None:
    lose_states(monkeypatch, change)
    with pytest.raises(UnsupportedModel, match="differ from Transformers"):
        check(config(installed(architecture)))


@pytest.mark.parametrize("architecture", ["JambaForCausalLM", "RecurrentGemmaForCausalLM"])
def test_what_forgets_between_chunks_is_noticed(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "FORGETFUL", set())
    with pytest.raises(UnsupportedModel, match="differ from Transformers"):
        check(config(architecture))


def test_newest_tokens_are_computed_together_and_others_alone() -> None:
    step = ragged([4, 0, 9, 0, 2], [1, 1, 1, 3, 2], [[0, 1, 2]] * 5, block_size=4)
    step = replace(step, rows=torch.tensor([7, 6, 5, 4, 3]))
    found = [(p.tokens.tolist(), p.rows.tolist(), p.begins) for p in pieces(step)]
    assert found == [
        ([[1]], [6], True),
        ([[3, 4, 5]], [4], True),
        ([[6, 7]], [3], False),
        ([[0], [2]], [7, 5], False),
    ]


def test_positions_of_inputs_and_outputs_stay_together() -> None:
    """A module with one state, that adds what it has seen before; and more than a tensor comes in and out."""

    class Sums(torch.nn.Module):
        def forward(self, x: torch.Tensor, more: tuple[torch.Tensor, int], cache_params: StateCache) -> tuple:
            before = cache_params.get_recurrent_state(0)
            sums = (x * more[0] * more[1]).cumsum(1) + (0 if before is None else before[:, None])
            cache_params.update_recurrent_state(sums[:, -1], 0)
            return sums, sums[:, -1]

    kept = (Kept(kind="recurrent", number=0, shape=(2,), exact=False),)
    rows = torch.zeros(4, 2)
    module = Stateful("sums", Sums())
    x, signs = torch.arange(24.0).reshape(12, 2), torch.ones(12, 1).index_fill(0, torch.tensor([3, 8]), -1)
    owner = torch.tensor([0, 0, 0, 1, 1, 2, 0, 1, 2, 0, 1, 2])
    steps: list[tuple[Ragged, slice]] = [
        (ragged([0, 0, 0], [3, 2, 1], [[0]] * 3, 8), slice(0, 6)),
        (ragged([3, 2, 1], [1, 1, 1], [[0]] * 3, 8), slice(6, 9)),
        (ragged([4, 3, 2], [1, 1, 1], [[0]] * 3, 8), slice(9, 12)),
    ]
    for step, span in steps:
        with states.computing(states.Over({"sums": (kept, (rows,))}, pieces(step))):
            sums, rest = module(x[span][None], (signs[span][None], 2), cache_params=None)
        for row, position in enumerate(range(span.start, span.stop)):
            seen = (owner == owner[position]) & (torch.arange(12) <= position)
            assert torch.equal(sums[0, row], (2 * x * signs)[seen].sum(0))
        assert rest is None


def test_rows_hold_what_modules_keep() -> None:
    """By a network's own config: shapes, and what is float32 although the network is not."""
    spec = describe("Qwen3NextForCausalLM", hf_config(config("Qwen3NextForCausalLM")))
    assert len(spec.attention) == 12
    names, kept = zip(*spec.states, strict=True)
    assert names[0] == "model.layers.0.linear_attn"
    window = Kept(kind="conv", number=0, shape=(8192, 4), exact=False)
    matrices = Kept(kind="recurrent", number=0, shape=(32, 128, 128), exact=True)
    assert kept == ((window, matrices),) * 36
    assert state_bytes(spec, 2) == 36 * (8192 * 4 * 2 + 32 * 128 * 128 * 4)
    rows = torch.zeros(3, state_bytes(spec, 2), dtype=torch.uint8)
    views = [*layer_states(spec, rows, torch.bfloat16)]
    assert views[:12] == [()] * 12
    assert [part.dtype for part in views[12]] == [torch.bfloat16, torch.float32]


def test_networks_without_positions_have_no_limit_of_their_own() -> None:
    assert describe("MambaForCausalLM", hf_config(config("MambaForCausalLM"))).max_length == LONGEST
    kimi = config(installed("KimiLinearForCausalLM")) | {"model_max_length": 12_345}
    assert describe("KimiLinearForCausalLM", hf_config(kimi)).max_length == 12_345


def test_weights_that_modules_read_themselves_are_not_packed() -> None:
    spec = describe("MambaForCausalLM", hf_config(config("MambaForCausalLM")))
    mine = {name.removeprefix("backbone.layers.0.mixer.") for name in spec.products if ".0.mixer." in name}
    assert mine == {"in_proj.weight", "x_proj.weight", "out_proj.weight"}


def test_shrinking_keeps_shares_of_heads_and_numbers_of_layers() -> None:
    raw = {
        "num_hidden_layers": 12,
        "hidden_size": 2048,
        "attention_hidden_size": 4096,
        "attention_head_dim": 128,
        "hybrid_layer_ids": [5, 11],
        "hybrid_override_pattern": "M-M-M*M-M-M*",
        "sliding_window_pattern": 4,
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "mamba_expand": 2,
        "mamba_headdim": 64,
        "n_mamba_heads": 64,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "hidden_act": "twelve signs",
    }
    assert shrink(raw) == {
        "num_hidden_layers": 6,
        "hidden_size": 64,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "hybrid_layer_ids": [2, 5],
        "hybrid_override_pattern": "M-*M-*",
        "sliding_window_pattern": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "mamba_expand": 2,
        "mamba_headdim": 32,
        "n_mamba_heads": 4,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "hidden_act": "twelve signs",
    }
