"""Random weights: the same whatever is read first, finite, and sharded like real ones."""

import torch

from quire.checkpoint.dummy import PERIOD, STD, DummyCheckpoint


def test_values_depend_on_seed_and_name_only() -> None:
    one, two = DummyCheckpoint(1), DummyCheckpoint(1)
    first = one.tensor("a.weight", shape=(30, 7))
    two.tensor("b.weight", shape=(5, 5))
    assert torch.equal(first, two.tensor("a.weight", shape=(30, 7)))
    assert not torch.equal(first, two.tensor("b.weight", shape=(30, 7)))
    assert not torch.equal(first, DummyCheckpoint(2).tensor("a.weight", shape=(30, 7)))


def test_tensors_do_not_share_memory() -> None:
    checkpoint = DummyCheckpoint(0)
    checkpoint.tensor("a.weight", shape=(4,)).fill_(9)
    assert checkpoint.tensor("a.weight", shape=(4,)).abs().max() < 1


def test_rows_are_those_of_the_whole_even_when_the_noise_repeats() -> None:
    checkpoint = DummyCheckpoint(3)
    shape = (2100, 4096)  # more numbers than the period
    assert shape[0] * shape[1] > 2 * PERIOD
    whole = checkpoint.tensor("mlp.up_proj.weight", shape=shape)
    assert torch.equal(
        checkpoint.tensor("mlp.up_proj.weight", shape=shape, rows=slice(1000, 2050)), whole[1000:2050]
    )
    assert len(whole[:, 0].unique()) > 100  # rows differ


def test_scales() -> None:
    checkpoint = DummyCheckpoint(0, torch.float32)
    weight = checkpoint.tensor("lm_head.weight", shape=(200, 300))
    assert abs(weight.std().item() - STD) < 0.1 * STD and abs(weight.mean().item()) < 0.1 * STD
    for name in ("norm.weight", "layers.0.attn_norm.weight", "layers.0.mixer.kv_a_layernorm.weight"):
        norm = checkpoint.tensor(name, shape=(1000,))
        assert abs(norm.mean().item() - 1) < STD and norm.std() < 2 * STD
    for name in ("norm.bias", "layers.0.mlp.gate.e_score_correction_bias", "layers.0.mixer.q_proj.bias"):
        assert checkpoint.tensor(name, shape=(1000,)).abs().max() < 0.2


def test_interface_of_a_checkpoint() -> None:
    checkpoint = DummyCheckpoint(0, torch.float16)
    assert "anything" in checkpoint
    assert checkpoint.tensor("scalar", shape=()).dtype == torch.float16
    assert checkpoint.unused() == []
    checkpoint.finish()
