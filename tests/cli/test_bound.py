"""The bound, by hand for networks small enough to do that."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

from quire.attention.shapes import block_bytes
from quire.cli import bound
from quire.cli.bound import Needs, Speed, bound_s, measure_ranks, num_devices
from quire.config import Config
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


class Threads(TorchDispatchMode):
    """How many threads operations have."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.add(torch.get_num_threads())
        return operation(*args, **(kwargs or {}))


def test_ranks_on_cpus_are_measured_with_all_their_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bound, "READ_BYTES", 2**20)
    monkeypatch.setattr(bound, "ROUNDS", 1)
    own = torch.get_num_threads()
    config = Config(model="m", device="cpu", dtype="float32", num_threads=2 * own + 2, tensor_parallel_size=2)
    with Threads() as threads:
        measure_ranks(config)
    assert (threads.seen, torch.get_num_threads()) == ({2 * own + 2}, own)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"device": "cpu", "tensor_parallel_size": 4}, 1),
        ({"device": "cpu", "tensor_parallel_size": 4, "nnodes": 2}, 2),
        ({"device": "cuda"}, 1),
        ({"device": "cuda", "tensor_parallel_size": 4, "pipeline_parallel_size": 2, "nnodes": 2}, 8),
    ],
)
def test_ranks_on_gpus_have_one_each(options: dict[str, object], count: int) -> None:
    assert num_devices(Config.of(model="m", **options)) == count
    assert Speed(bytes_per_s=3.0, flops_per_s=2.0).times(4) == Speed(bytes_per_s=12.0, flops_per_s=8.0)


def test_the_best_of_two_measurements() -> None:
    best = Speed(bytes_per_s=1.0, flops_per_s=9.0).best_of(Speed(bytes_per_s=5.0, flops_per_s=2.0))
    assert best == Speed(bytes_per_s=5.0, flops_per_s=9.0)
