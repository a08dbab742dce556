"""What `quire inspect` prints."""

from dataclasses import replace

from quire.models.describe import describe, difference
from quire.models.names import Names
from quire.models.registry import decoder_spec
from tests.models.published import PUBLISHED

SPECS = {name: decoder_spec(config) for name, (config, *_) in PUBLISHED.items()}


def test_equal_layers_are_described_once() -> None:
    lines = describe(*SPECS["Llama-3.1-8B"]).splitlines()
    assert lines[0] == "8.03 B parameters; 128 KiB of 16-bit cache per token"
    assert [line for line in lines if line.startswith("layers")] == ["layers 0-31"]
    assert any("num_kv_heads=8" in line and "theta=500000" in line for line in lines)


def test_alternating_layers_are_grouped() -> None:
    text = describe(*SPECS["gemma-2-9b"])
    assert "layers 0-40 by 2\n" in text and "layers 1-41 by 2\n" in text
    assert text.endswith("not loaded: ^lm_head\\.weight$")


def test_irregular_layers_are_grouped() -> None:
    text = describe(*SPECS["gemma-3-1b"])
    assert "layers 0-4 6-10 12-16 18-22 24-25\n" in text and "layers 5-23 by 6\n" in text


def test_experts_and_fused_tensors_are_mentioned() -> None:
    assert describe(*SPECS["DeepSeek-V3"]).startswith("671 B parameters, 37.6 B active;")
    assert "stored as qkv_proj = q_proj + k_proj + v_proj" in describe(*SPECS["Phi-3-mini-128k"])
    assert "query_key_value = q_proj + k_proj + v_proj, in 8 groups" in describe(*SPECS["pythia-1b"])
    assert "stored transposed: c_attn" in describe(*SPECS["gpt2"])


def test_stacks_are_mentioned() -> None:
    names = Names(stacked=((r"\.experts\.up$", ".experts.{}.up.weight"),))
    assert "stored as a stack: .experts.{}.up.weight" in describe(SPECS["Llama-3.1-8B"][0], names)


def test_difference_names_fields_and_layers() -> None:
    a, b = SPECS["Mistral-7B"][0], SPECS["Mixtral-8x7B"][0]
    assert difference(a, a) == []
    assert difference(a, b) == [
        "layers 0-31 mixer.rope.theta: 10000 -> 1000000",
        "layers 0-31 mixer.window: 4096 -> None",
        "layers 0-31 mlp: MLP(hidden=14336) -> MoE(num_experts=8, top_k=2, expert=MLP(hidden=14336))",
    ]
    shorter = replace(a, blocks=a.blocks[:30], vocab_size=32_064)
    assert difference(a, shorter) == ["vocab_size: 32000 -> 32064", "layers: 32 -> 30"]
