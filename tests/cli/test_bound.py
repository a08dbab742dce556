"""The bound, by hand for networks small enough to do that."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from quire.attention.shapes import block_bytes
from quire.cli.bound import Needs, Speed, bound_s
from quire.models.registry import decoder_spec
from quire.models.spec import MLA, MLP, Attention, Block, Decoder, Indexer, MoE, Norm, Rope

NORM = Norm()
ROPE = Rope(dim=16)
ATTENTION = Attention(num_heads=4, num_kv_heads=2, head_dim=16, rope=ROPE)
MOE = MoE(num_experts=8, top_k=2, expert=MLP(hidden=10), shared=MLP(hidden=20))


def decoder(mixer: Attention | MLA = ATTENTION, mlp: MLP | MoE | None = None, layers: int = 1) -> Decoder:
    block = Block(mixer=mixer, mlp=mlp or MLP(hidden=32), attn_norm=NORM, mlp_norm=NORM)
    return Decoder(vocab_size=100, dim=64, max_length=512, blocks=(block,) * layers, norm=NORM)


def needs(spec: Decoder) -> Needs:
    return Needs(spec, 2)


def test_weights_are_those_of_a_checkpoint(tiny: str) -> None:
    spec, _ = decoder_spec(json.loads((Path(tiny) / "config.json").read_text()))
    with safe_open(Path(tiny) / "model.safetensors", "np") as file:
        tensors = [file.get_tensor(name) for name in file.keys() if "embed" not in name]  # noqa: SIM118
    final_norm = spec.dim
    assert needs(spec).weight_bytes(1) == 2 * (sum(t.size for t in tensors) - final_norm)


def test_latent_attention() -> None:
    mla = MLA(num_heads=4, q_rank=24, kv_rank=16, nope_dim=12, rope_dim=8, v_dim=10, rope=ROPE, norm=NORM)
    (layer,) = needs(decoder(mla)).layers
    assert layer.cached == 16 + 8
    assert layer.pair_flops == 2 * 4 * (12 + 8 + 10)


def test_chosen_positions_bound_what_is_read_beside_what_they_are_chosen_by() -> None:
    indexer = Indexer(num_heads=3, head_dim=10, top_k=20, rope=ROPE, norm=NORM)
    mla = MLA(num_heads=4, q_rank=24, kv_rank=16, nope_dim=12, rope_dim=8, v_dim=10, rope=ROPE, norm=NORM)
    need = needs(decoder(replace(mla, indexer=indexer), layers=2))
    assert need.cache_bytes(15) == 2 * 2 * 15 * (24 + 10)
    assert need.cache_bytes(100) == 2 * 2 * (20 * 24 + 100 * 10)


def test_experts_are_read_once_however_many_tokens_meet_them() -> None:
    (layer,) = needs(decoder(mlp=MOE)).layers
    assert layer.met(1) == pytest.approx(2)
    assert layer.met(2) == pytest.approx(2 + 2 * 6 / 8)
    assert layer.met(1000) == pytest.approx(8)
    assert layer.expert == 3 * 64 * 10
    (dense,) = needs(decoder(mlp=MLP(hidden=32))).layers
    shared_and_router = 3 * 64 * 20 + 64 * 8
    assert layer.always == dense.always - 3 * 64 * 32 + shared_and_router
    assert (dense.met(5), dense.expert) == (0, 0)


def test_cache_is_what_the_engine_stores() -> None:
    spec = decoder(layers=3)
    assert needs(spec).cache_bytes(256) == block_bytes(spec, 256, 2)


def test_a_window_bounds_what_is_read() -> None:
    local = decoder(Attention(num_heads=4, num_kv_heads=2, head_dim=16, rope=ROPE, window=8))
    assert needs(local).cache_bytes(100) == needs(decoder()).cache_bytes(8)
    pairs = 8 * 9 / 2 + 92 * 8
    assert needs(local).attention_flops(100) == 2 * 4 * 32 * pairs


def test_decoding_is_bound_by_reading() -> None:
    spec = decoder()
    need = needs(spec)
    slow_memory = Speed(bytes_per_s=1000.0, flops_per_s=1e30)
    steps = sum(need.weight_bytes(2) + 2 * need.cache_bytes(5 + step) for step in (1, 2))
    expected = (need.weight_bytes(10) + steps) / 1000
    assert bound_s(slow_memory, need, [5, 5], [3, 3]) == pytest.approx(expected)


def test_prefill_is_bound_by_multiplying() -> None:
    need = needs(decoder())
    slow_compute = Speed(bytes_per_s=1e30, flops_per_s=1000.0)
    weights = 64 * 16 * 2 * (4 + 2) + 3 * 64 * 32 + 2 * 64  # attention, feed-forward, norms
    expected = 2 * (weights * 7 + 64 * 100) + 2 * 4 * 32 * (7 * 8 / 2)
    assert bound_s(slow_compute, need, [7], [1]) == pytest.approx(expected / 1000)


def test_outputs_of_one_prompt_share_its_prefill() -> None:
    need, speed = needs(decoder()), Speed(bytes_per_s=1e30, flops_per_s=1000.0)
    prefill = bound_s(speed, need, [7], [1])
    assert bound_s(speed, need, [7], [1], n=4) == prefill
    assert bound_s(speed, need, [7], [3], n=4) == pytest.approx(prefill + 2 * need.flops(4, 4) / 1000)


def test_short_outputs_leave_the_batch() -> None:
    need, speed = needs(decoder()), Speed(bytes_per_s=1e30, flops_per_s=1000.0)
    both = bound_s(speed, need, [4, 4], [1, 3])
    assert both == pytest.approx(bound_s(speed, need, [4, 4], [1, 1]) + 2 * need.flops(1, 1) / 1000)


def test_the_best_of_two_measurements() -> None:
    best = Speed(bytes_per_s=1.0, flops_per_s=9.0).best_of(Speed(bytes_per_s=5.0, flops_per_s=2.0))
    assert best == Speed(bytes_per_s=5.0, flops_per_s=9.0)
