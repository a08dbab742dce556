"""Transformers' modules over our cache compute what they do by themselves, and what would not is found out."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quire.checkpoint.reader import stored_tensors
from quire.errors import CheckpointError, ModelError, UnsupportedModel
from quire.layers.hf import alone, attention, conformance, network, source
from quire.layers.hf.attention import Call, Paged
from quire.layers.hf.conformance import TOLERANCE, check, difference, prepare
from quire.layers.hf.experts import Experts
from quire.layers.hf.latent import Latent
from quire.layers.hf.shrink import shrink
from quire.layers.hf.source import describe, hf_config
from quire.layers.hf.states import Piece, pieces
from quire.models.catalog import refused, rows
from quire.models.foreign import generating
from quire.models.registry import TRANSFORMERS
from tests.models.case import EARLIEST, IS_EARLIEST
from tests.models.cases import BY_NAME, build_hf, config_of
from tests.models.foreign import UNLIKE, config, outcome
from tests.models.published import PUBLISHED

VERIFIED = {row["architecture"]: list(row["features"]) for row in rows() if row["road"] == TRANSFORMERS}
SOME = (
    "LlamaForCausalLM",
    "Gemma2ForCausalLM",
    "GptOssForCausalLM",
    "DeepseekV3ForCausalLM",
    "Qwen2MoeForCausalLM",
    "BertLMHeadModel",
    "LongcatFlashForCausalLM",
    "Gemma3nForCausalLM",
    "JetMoeForCausalLM",
    "HrmTextForCausalLM",
)
ALONE = (  # no attention function, positions by the cache's length, biases or masks of their own
    "FalconForCausalLM",
    "BartForCausalLM",
    "BloomForCausalLM",
    "DogeForCausalLM",
    "RoFormerForCausalLM",
)
# Published configs leave out what their classes take for granted, which is of the size of the published network.
BRIEF = ("Phi-3-mini-128k", "GPT-Neo-2.7B", "gemma-3-1b")
LONGER = [
    name for name, (raw, *_) in PUBLISHED.items() if raw["architectures"][0] in VERIFIED and name not in BRIEF
]
LATE = (  # what begins behind many positions in published networks: a class, a key, and its value without that
    ("Llama4ForCausalLM", "attn_temperature_tuning", False),
    ("Llama4ForCausalLM", "attention_chunk_size", 64),
)
Change = Callable[[Call], Call]
Pieces = Callable[[list[Piece]], list[Piece]]
CONTROLS: dict[str, tuple[str, Change]] = {  # a class that has the feature, and the feature lost
    "scale": ("LlamaForCausalLM", lambda call: dataclasses.replace(call, scale=call.scale * 1.1)),
    "window": ("MistralForCausalLM", lambda call: dataclasses.replace(call, window=None)),
    "window off by one": (
        "MistralForCausalLM",
        lambda call: dataclasses.replace(call, window=call.window and call.window + 1),
    ),
    "window left to a mask": ("Qwen2MoeForCausalLM", lambda call: dataclasses.replace(call, window=None)),
    "softcap": ("Gemma2ForCausalLM", lambda call: dataclasses.replace(call, softcap=None)),
    "sinks": ("GptOssForCausalLM", lambda call: dataclasses.replace(call, sinks=None)),
}


def installed(architecture: str) -> str:
    if IS_EARLIEST and architecture in UNLIKE:
        pytest.skip(f"Transformers {EARLIEST} computes {architecture} otherwise")
    if architecture not in generating():
        pytest.skip(f"Transformers {transformers.__version__} has no {architecture}")
    return architecture


@pytest.mark.parametrize("architecture", [*SOME, *ALONE])
def test_pieces_in_batches_equal_whole_sequences(architecture: str) -> None:
    found = check(config(installed(architecture)))
    assert found.difference <= TOLERANCE
    assert found.alone == (architecture in ALONE)


@pytest.mark.parametrize("name", [*BRIEF, *(pytest.param(name, marks=pytest.mark.slow) for name in LONGER)])
def test_configs_as_they_were_published_agree(name: str) -> None:
    raw = PUBLISHED[name][0]
    installed(raw["architectures"][0])
    before = json.dumps(raw)
    assert check(raw).difference <= TOLERANCE
    assert json.dumps(raw) == before, "classes of Transformers' write into what they are made of"


def test_a_window_that_a_class_ignores_is_ignored() -> None:
    raw = config(installed("NemotronHForCausalLM"))
    assert check({**raw, "sliding_window": 5}).difference <= TOLERANCE


@pytest.mark.parametrize(("architecture", "key", "value"), LATE)
def test_what_begins_late_shows_in_a_small_network(architecture: str, key: str, value: object) -> None:
    raw = config(installed(architecture))
    trial, is_alone = prepare(raw), check(raw).alone
    without = hf_config(trial.config.to_dict() | {"architectures": [architecture], key: value})
    assert difference(trial, is_alone) <= TOLERANCE
    assert difference(dataclasses.replace(trial, config=without), is_alone) > TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("architecture", VERIFIED)
def test_every_class_that_is_listed(architecture: str) -> None:
    assert outcome(installed(architecture)) == VERIFIED[architecture]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", VERIFIED)
def test_every_class_notices_what_it_lost(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale, windows, sinks, caps, and states."""
    raw = config(installed(architecture))
    is_alone = "alone" in VERIFIED[architecture]
    trial, spec = prepare(raw), describe(architecture, hf_config(shrink(raw)), is_alone)
    if spec.attention:
        for name in ("scale", *(name for name in CONTROLS if f"attention.{name}" in VERIFIED[architecture])):
            with monkeypatch.context() as patch:
                lose_scale_of_kept(patch) if is_alone else lose(CONTROLS[name][1], patch)
                assert difference(trial, is_alone) > TOLERANCE, name
    if spec.states:
        lose_states(monkeypatch, lost)
        assert difference(trial) > TOLERANCE


@pytest.mark.parametrize("architecture", ALONE)
def test_one_alone_notices_other_keys(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lose_scale_of_kept(monkeypatch)
    assert difference(prepare(config(installed(architecture))), alone=True) > TOLERANCE


def lose_scale_of_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys come back from the cache larger than they were."""
    whole = alone._read

    def changed(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = whole(*args)
        return k * 1.1, v

    monkeypatch.setattr(alone, "_read", changed)


@pytest.mark.slow
def test_nothing_else_runs() -> None:
    if transformers.__version__ != conformance_version():
        pytest.skip("the list is of another version of Transformers")
    served = {name for name in generating() if not isinstance(outcome(name), str)}
    assert served == set(VERIFIED)
    assert refused().keys() == generating().keys() - served


def conformance_version() -> str:
    from tests.models.verified import written_foreign

    return str(written_foreign()["version"])


@pytest.mark.parametrize("name", CONTROLS)
def test_a_lost_feature_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, change = CONTROLS[name]
    lose(change, monkeypatch)
    assert difference(prepare(config(installed(architecture)))) > TOLERANCE


def test_a_prompt_that_does_not_see_itself_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = prepare(config(installed("HrmTextForCausalLM")))
    monkeypatch.setattr(source, "spans_of", lambda c: None)
    assert difference(trial) > TOLERANCE


def test_experts_that_count_alike_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Experts.forward
    monkeypatch.setattr(
        Experts, "forward", lambda self, x, chosen, w: whole(self, x, chosen, w.mean() + 0 * w)
    )
    assert difference(prepare(config(installed("DeepseekV3ForCausalLM")))) > TOLERANCE


def test_latents_that_are_no_values_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Latent.expand
    monkeypatch.setattr(Latent, "expand", lambda self, found: whole(self, found.flip(-1)))
    assert difference(prepare(config(installed("DeepseekV3ForCausalLM")))) > TOLERANCE


def test_positions_that_start_elsewhere_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "first_position", lambda model: 0)
    assert difference(prepare(config(installed("RobertaForCausalLM")))) > TOLERANCE


def test_a_type_of_its_authors_own_is_what_the_class_is_for() -> None:
    assert check(config_of(BY_NAME["DeepseekV3-kimi_k2"])).difference <= TOLERANCE


def lose(change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Paged.attend
    monkeypatch.setattr(Paged, "attend", lambda self, call: whole(self, change(call)))


def lose_states(monkeypatch: pytest.MonkeyPatch, change: Pieces) -> None:
    monkeypatch.setattr(network, "pieces", lambda step: change(pieces(step)))


def lost(found: list[Piece]) -> list[Piece]:
    return [dataclasses.replace(piece, begins=True) for piece in found]


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("BertLMHeadModel", {"is_decoder": False}, "no decoder.*is_decoder"),
        ("OpenAIGPTLMHeadModel", {}, "no layer calls.*one sequence at a time.*keeps neither"),
        ("CpmAntForCausalLM", {}, "no decoder"),
        (
            "LlamaForCausalLM",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "dynamic",
        ),
        ("LlamaForCausalLM", {"hidden_act": "swoosh"}, "swoosh"),
    ],
)
def test_refusals(architecture: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises((UnsupportedModel, ModelError), match=message):
        check(config(architecture) | changes)


def test_longrope_is_decided_once() -> None:
    """By the longest sequence that may come, not by the longest in a batch."""
    raw = config_of(BY_NAME["Phi3-long"])
    for max_length, name in ((16, "short_factor"), (17, "long_factor")):
        rope = hf_config(raw, max_length).rope_parameters
        assert rope["short_factor"] == rope["long_factor"] == raw["rope_parameters"][name]


def test_shrinking_keeps_kinds_of_layers_and_shares_of_heads() -> None:
    raw = {
        "num_hidden_layers": 10,
        "layer_types": ["a", "a", "b", "a", "a", "b", "a", "a", "b", "a"],
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "per_layer_config": {"2": {"head_dim": 512}, "9": {"head_dim": 256}},
        "tie_word_embeddings": True,
        "sliding_window": None,
    }
    assert shrink(raw) == {
        "num_hidden_layers": 4,
        "layer_types": ["a", "b", "a", "b"],
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "per_layer_config": {"1": {"head_dim": 16}},
        "tie_word_embeddings": True,
        "sliding_window": None,
    }


def test_description_needs_no_weights() -> None:
    spec = describe("Gemma2ForCausalLM", hf_config(config("Gemma2ForCausalLM")))
    assert (spec.vocab_size, spec.dim, len(spec.attention)) == (256_000, 2304, 26)
    assert [call.window for call in spec.attention[:2]] == [4096, None]
    assert spec.attention[0].num_kv_heads == 4
    names = dict(spec.parameters)
    assert spec.head == "lm_head.weight"
    assert spec.head not in names  # tied
    assert "model.layers.0.mlp.gate_proj.weight" in spec.products


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    build_hf(BY_NAME["Llama"], tmp_path)
    raw = config_of(BY_NAME["Llama"])
    network = conformance.small_network("LlamaForCausalLM", hf_config(raw))
    tensors = stored_tensors(tmp_path)
    network.load(tensors)
    for changed, message in (
        ({"surprise": tensors["model.norm.weight"]}, "1 not in the network: surprise"),
        ({"model.norm.weight": tensors["lm_head.weight"]}, "1 of another shape: model.norm.weight"),
    ):
        with pytest.raises(CheckpointError, match=message):
            network.load({**tensors, **changed})
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing: model\.layers\.1\.mlp\.up_proj"):
        network.load(tensors)


def test_calls_outside_a_step_fail() -> None:
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(LookupError):
        attention.attention(torch.nn.Identity(), q, q, q, None)
