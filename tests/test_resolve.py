"""What is derived, from facts about a machine that is not there."""

from dataclasses import replace

import pytest

from quire.config import Config
from quire.errors import CapacityError, ConfigError
from quire.models.registry import decoder_spec
from quire.models.spec import Decoder, DeltaNet, KimiDelta, Lightning, Mixer, Norm
from quire.resolve import EXACT_LOGPROBS, Machine, Resolved, resolve
from tests.models.cases import BY_NAME, config_of

GIB = 2**30
CPU = Machine(
    device="cpu",
    total_bytes=16 * GIB,
    available_bytes=12 * GIB,
    num_cores=4,
    fast_dtypes=("bfloat16", "float32"),
    block_size=16,
    asynchronous=False,
)
GPU = replace(
    CPU,
    device="cuda",
    total_bytes=80 * GIB,
    available_bytes=79 * GIB,
    fast_dtypes=("bfloat16", "float16"),
    block_size=64,
    asynchronous=True,
)
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def spec() -> Decoder:
    return decoder_spec(LLAMA)[0]


def derive(spec: Decoder, machine: Machine = CPU, *, offline: bool = True, **options: object) -> Resolved:
    return resolve(Config(model="m", **options), spec, machine, checkpoint_dtype="bfloat16", offline=offline)


@pytest.mark.parametrize(
    ("mixer", "least"),
    [
        (DeltaNet(num_k_heads=16, num_v_heads=64, k_dim=128, v_dim=128, width=4, norm=Norm()), 48_000),
        (KimiDelta(num_heads=64, head_dim=128, width=4, norm=Norm(), rank=128), 64_000),
        (Lightning(num_heads=64, head_dim=128, rate=1.0, norm=Norm()), 48_000),
    ],
    ids=lambda x: type(x).__name__,
)
def test_work_space_has_room_for_what_recurrent_layers_make(spec: Decoder, mixer: Mixer, least: int) -> None:
    """Numbers of a position: inputs, convolved ones, queries and keys in float32, and results."""
    blocks = tuple(replace(block, mixer=mixer) for block in spec.blocks)
    options = {"max_num_batched_tokens": 4096, "max_num_seqs": 1}
    one, other = (derive(s, GPU, **options).memory for s in (spec, replace(spec, blocks=blocks)))
    assert other.work_bytes > one.work_bytes
    assert other.work_bytes > 4 * 4096 * least


def test_nothing_is_left_open(spec: Decoder) -> None:
    for machine in (CPU, GPU):
        config = derive(spec, machine).config
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "num_threads"):
            assert getattr(config, name) is not None
        assert (config.device, config.dtype) == (machine.device, "bfloat16")


def test_the_memory_adds_up(spec: Decoder) -> None:
    memory = derive(spec, GPU).memory
    assert memory.weight_bytes == 2 * 1_235_814_400  # Llama 3.2 1B
    assert memory.cache_bytes == memory.num_blocks * memory.block_bytes
    assert memory.block_bytes == 64 * 16 * 2 * 8 * 64 * 2  # tokens, layers, k and v, heads, head_dim, bytes
    total = memory.weight_bytes + memory.work_bytes + memory.cache_bytes
    assert 0.85 * GPU.total_bytes < total <= 0.9 * GPU.total_bytes
    half = derive(spec, GPU, gpu_memory_utilization=0.45).memory
    assert half.cache_bytes < memory.cache_bytes / 2
    assert derive(spec, GPU, kv_cache_memory_bytes=GIB).memory.cache_bytes <= GIB


def test_a_cpu_leaves_memory_to_others(spec: Decoder) -> None:
    memory = derive(spec).memory
    assert memory.cache_bytes <= (CPU.available_bytes - memory.weight_bytes) / 2


def test_half_precision_without_a_fast_path_becomes_what_has_one(spec: Decoder) -> None:
    found = resolve(Config(model="m"), spec, CPU, checkpoint_dtype="float16", offline=True)
    assert found.config.dtype == "bfloat16" and "float16" in found.reasons["dtype"]
    assert derive(spec, dtype="float32").config.dtype == "float32"


def test_the_context_is_what_fits_and_a_demand_is_refused(spec: Decoder) -> None:
    small = 300 * derive(spec).memory.block_bytes
    found = derive(spec, kv_cache_memory_bytes=small)
    assert found.config.max_model_len == 300 * 16
    assert "8192" in found.reasons["max_model_len"]
    with pytest.raises(CapacityError, match="8192 tokens"):
        derive(spec, kv_cache_memory_bytes=small, max_model_len=8192)


def test_steps_hold_every_sequence(spec: Decoder) -> None:
    assert derive(spec, max_num_batched_tokens=7).config.max_num_seqs == 7


def test_gaps_matter_to_those_who_read_along(spec: Decoder) -> None:
    assert derive(spec).config.max_token_gap_ms == 0
    assert (derive(spec, offline=False).config.max_token_gap_ms or 0) > 0
    assert derive(spec, offline=False, max_token_gap_ms=7.0).config.max_token_gap_ms == 7.0


def test_only_a_device_that_runs_by_itself_is_planned_ahead(spec: Decoder) -> None:
    assert derive(spec).config.async_scheduling is False
    assert derive(spec, GPU).config.async_scheduling is True
    assert derive(spec, GPU, async_scheduling=False).config.async_scheduling is False


@pytest.mark.parametrize(
    ("machine", "options", "error", "message"),
    [
        (CPU, {"max_model_len": 9000}, ConfigError, "at most 8192"),
        (replace(CPU, available_bytes=GIB), {}, CapacityError, "Free memory"),
        (CPU, {"kv_cache_memory_bytes": 100 * GIB}, CapacityError, "GiB are left"),
    ],
)
def test_what_cannot_be_says_why(
    spec: Decoder, machine: Machine, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        derive(spec, machine, **options)


def test_deterministic_says_what_it_costs_and_what_it_cannot_have(spec: Decoder) -> None:
    assert "deterministic" not in derive(spec, GPU).reasons
    assert "anyway" in derive(spec, deterministic=True, max_logprobs=-1).reasons["deterministic"]
    assert (
        "one form"
        in derive(spec, GPU, deterministic=True, max_logprobs=EXACT_LOGPROBS).reasons["deterministic"]
    )
    for most in (-1, EXACT_LOGPROBS + 1):
        with pytest.raises(ConfigError, match=f"max_logprobs is {most}; .* between 0 and {EXACT_LOGPROBS}"):
            derive(spec, GPU, deterministic=True, max_logprobs=most)


@pytest.mark.parametrize(("quantization", "share"), [("int8", 0.5), ("int4", 0.5 * 0.53125)])
def test_quantized_weights_leave_more_for_the_cache(spec: Decoder, quantization: str, share: float) -> None:
    config = Config.of(model="x", quantization=quantization)
    plain, found = (
        resolve(c, spec, CPU, checkpoint_dtype="bfloat16", offline=True).memory.weight_bytes
        for c in (Config.of(model="x"), config)
    )
    embedding = 2 * 2048 * 128256  # stays, and the head beside it has 8 bits
    assert found == pytest.approx((plain - embedding) * share + 1.5 * embedding, rel=1e-3)
    with pytest.raises(ConfigError, match="is for CPUs, and the device is a cuda"):
        resolve(config, spec, GPU, checkpoint_dtype="bfloat16", offline=True)


def test_a_quantized_cache_holds_more_and_is_for_cpus(spec: Decoder) -> None:
    options = {"kv_cache_memory_bytes": GIB, "max_model_len": 1024}
    plain, small = (derive(spec, kv_cache_dtype=kept, **options).memory for kept in ("auto", "int8"))
    assert small.block_bytes / plain.block_bytes == (64 + 4) / (64 * 2)  # a head's numbers and their scale
    assert small.num_blocks == GIB // small.block_bytes > plain.num_blocks
    with pytest.raises(ConfigError, match="kv_cache_dtype is int8.* cuda, which takes auto"):
        derive(spec, GPU, kv_cache_dtype="int8")


def test_choosing_positions_takes_memory_once_sequences_are_longer_than_what_is_seen() -> None:
    sparse, _ = decoder_spec(config_of(BY_NAME["DeepseekV32"]))
    short, long = (derive(sparse, GPU, max_model_len=n, max_num_batched_tokens=100) for n in (6, 7))
    assert long.memory.work_bytes - short.memory.work_bytes == 2**28 + 4 * 100 * 6
