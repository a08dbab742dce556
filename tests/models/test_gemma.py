"""Gemma 3n and 4: two spellings of its layers' shapes, sizes as Hugging Face counts them, and tokens beyond a table."""

import pytest
import torch
import transformers

from quire.attention.reference import Reference
from quire.checkpoint.dummy import DummyCheckpoint
from quire.layers.base import Build
from quire.layers.embeddings import LayerEmbeddings
from quire.layers.rope import RopeTables
from quire.models.parameters import kv_bytes_per_token, num_parameters
from quire.models.registry import decoder_spec
from quire.models.spec import LayerEmbedding, Norm
from tests.models.cases import BY_NAME, config_of

SHAPES = {"global_head_dim": 32, "num_global_key_value_heads": 1}
E2B = {
    "num_hidden_layers": 35,
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_key_value_heads": 1,
    "num_kv_shared_layers": 20,
    "use_double_wide_mlp": True,
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
}
A4B = {
    "hidden_size": 2816,
    "intermediate_size": 2112,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 704,
    "use_bidirectional_attention": "vision",
}
SIZES = (("Gemma4", {}), ("Gemma4", E2B), ("Gemma4", A4B), ("Gemma3n", {}))


def test_shapes_of_layers_are_spelled_in_two_ways() -> None:
    saved = config_of(BY_NAME["Gemma4"])
    assert saved["per_layer_config"]["1"] == {"head_dim": 32, "num_key_value_heads": 1}
    published = {key: value for key, value in saved.items() if key != "per_layer_config"} | SHAPES
    assert decoder_spec(published) == decoder_spec(saved)
    spec, _ = decoder_spec(published | {"attention_k_eq_v": False})
    assert [block.mixer.num_kv_heads for block in spec.blocks] == [2] * 6


@pytest.mark.parametrize(("name", "values"), SIZES, ids=lambda value: value if isinstance(value, str) else "")
def test_large_networks_have_the_parameters_of_hugging_face(name: str, values: dict[str, object]) -> None:
    config = getattr(transformers, f"{name}TextConfig")(**values)
    with torch.device("meta"):
        theirs = getattr(transformers, f"{name}ForCausalLM")(config)
    spec, _ = decoder_spec(config.to_dict() | {"architectures": [f"{name}ForCausalLM"]})
    scalars = sum(buffer.numel() for key, buffer in theirs.named_buffers() if key.endswith(".layer_scalar"))
    assert num_parameters(spec).total == sum(p.numel() for p in theirs.parameters()) + scalars


def test_layers_that_share_cache_nothing() -> None:
    spec, _ = decoder_spec(
        transformers.Gemma4TextConfig(**E2B).to_dict() | {"architectures": ["Gemma4ForCausalLM"]}
    )
    assert [block.mixer.shares for block in spec.blocks[13:22]] == [None, None, 13, 13, 13, 13, 14, 13, 13]
    assert kv_bytes_per_token(spec) == 2 * (12 * 2 * 256 + 3 * 2 * 512)


def test_tokens_beyond_the_table_have_its_first_row() -> None:

    device = torch.device("cpu")
    build = Build(16, torch.float32, device, Reference(4), RopeTables(8, device))
    part = LayerEmbedding(dim=8, act="silu", norm=Norm())
    layer = LayerEmbeddings([part, part], 5, build)
    layer.load(DummyCheckpoint(dtype=torch.float32))
    x = torch.randn(1, 16).expand(4, 16)
    for of_layer in layer(torch.tensor([0, 4, 5, 99]), x):
        assert of_layer[2].equal(of_layer[0]) and of_layer[3].equal(of_layer[0])
        assert not of_layer[1].equal(of_layer[0])
