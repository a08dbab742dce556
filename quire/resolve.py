"""From what the user said, the network and the machine to every option's value, with the reason for each. Pure."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from quire.attention.groups import Layout, cache_layout, in_common
from quire.attention.shapes import CHOICE_BYTES
from quire.attention.states import state_bytes
from quire.config import Config
from quire.errors import CapacityError, ConfigError
from quire.models.parameters import layer_dims, parameter_shapes
from quire.models.shard import WholeExperts, check_parts, shard
from quire.models.spec import (
    MLP,
    RGLRU,
    Both,
    Decoder,
    DeltaNet,
    Foreign,
    Guided,
    KimiDelta,
    Lightning,
    Mamba,
    Mamba2,
    Mixer,
    MoE,
    Spec,
    num_chosen,
)
from quire.models.stages import layers_of, stage_shapes, stages
from quire.scheduler.near import Extent

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
MAX_SEQS = {"cpu": 256, "cuda": 1024}
BATCHED_TOKENS = {"cpu": 2048, "cuda": 8192}
CPU_CACHE_SHARE = 0.5  # of the memory that is left: other programs live here too
HEAD = "lm_head.weight"
BITS = {"int8": 8, "int4": 4}  # of weights, by the option's name
UNQUANTIZED = (
    ".gate.weight",
    "shared_expert_gate.weight",
    "kv_b_proj.weight",
    "x_proj.weight",
    "dt_proj.weight",
    "A_log",
    "gate_bias",
    "_coefs.weight",
    "modality_router.weight",
    "wq_b.weight",
    "wk.weight",
    "weights_proj.weight",
)  # small, or multiplied another way
SPARE_BLOCKS = 32_768  # for the prefix cache; a small model could otherwise fill the machine with it
STATE_SHARE = (
    0.5  # of the cache's memory, for states of sequences that run; of the rest, for those that are kept
)
WIDE = 4  # copies of a layer's largest output that modules of others hold at once
INVERSES = 32  # half the numbers that a head and position of a chunk has of what keys make of each other
SCORES = 3  # and of a layer's scores, where modules attend themselves
EXACT_LOGPROBS = 64  # that a kernel finds in one order; more are sorted by torch
ONLINE_GAP_MS = {"cpu": 250.0, "cuda": 50.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Facts about the device. Bytes of memory; `fast_dtypes` have kernels of their own, best first."""

    device: str  # cpu | cuda
    total_bytes: int
    available_bytes: int
    num_cores: int
    fast_dtypes: tuple[str, ...]
    block_size: int  # what the attention backend prefers
    asynchronous: bool  # the device computes while the host goes on

    def part(self, num_parts: int) -> "Machine":
        """What one of several engine groups, or ranks, may have of it; each has a GPU of its own, if these are any."""
        num_sharing = num_parts if self.device == "cpu" else 1
        return dataclasses.replace(
            self,
            total_bytes=self.total_bytes // num_sharing,
            available_bytes=self.available_bytes // num_sharing,
            num_cores=max(self.num_cores // num_parts, 1),
        )


@dataclass(frozen=True, slots=True)
class Memory:
    """Where the memory of a rank goes, in bytes."""

    weight_bytes: int
    work_bytes: int
    cache_bytes: int
    layout: Layout
    num_blocks: int
    state_bytes: int = 0  # of a sequence's recurrent layers
    num_states: int = 0  # sequences' states that can be kept for others, beside those that run

    @property
    def block_bytes(self) -> int:
        return self.layout.block_bytes

    def most_blocks(self, budget: int, num_rows: int) -> int:
        """Blocks for which there is room beside so many rows of states."""
        return (budget - num_rows * self.state_bytes) // self.block_bytes

    def filled(self, num_blocks: int, num_rows: int, num_states: int) -> "Memory":
        """The same with a cache."""
        cache_bytes = num_blocks * self.block_bytes + num_rows * self.state_bytes
        return dataclasses.replace(
            self, cache_bytes=cache_bytes, num_blocks=num_blocks, num_states=num_states
        )


@dataclass(frozen=True, slots=True)
class Resolved:
    """A config without None where a value is needed, the memory plan of each stage's ranks, and why: option -> reason.

    The fullest ranks decide: all have as many blocks and rows of states, whatever else they might have room for.
    """

    config: Config
    memories: tuple[Memory, ...]
    reasons: Mapping[str, str]

    @property
    def memory(self) -> Memory:
        """The first rank's."""
        return self.memories[0]


def resolve_dtype(config: Config, checkpoint_dtype: str | None, machine: Machine) -> tuple[str, str]:
    """The type of weights and activations, and why."""
    if config.dtype != "auto":
        return config.dtype, "asked for"
    if checkpoint_dtype in machine.fast_dtypes:
        return checkpoint_dtype, "the checkpoint's"
    best = machine.fast_dtypes[0]
    return (
        best,
        f"the checkpoint says {checkpoint_dtype}, and {best} is what a {machine.device} computes fast",
    )


def resolve(
    config: Config, spec: Spec, machine: Machine, *, checkpoint_dtype: str | None, offline: bool
) -> Resolved:
    """Fill in everything that was not said.

    Args:
        checkpoint_dtype: what config.json calls the weights' type, if it does.
        offline: nobody reads tokens as they come, so no gap between them has to be kept.

    Raises:
        ConfigError: a value contradicts the model.
        CapacityError: the weights, or one request of the asked length, do not fit.
    """
    reasons: dict[str, str] = {}
    dtype, reasons["dtype"] = resolve_dtype(config, checkpoint_dtype, machine)
    block_size = config.block_size or machine.block_size
    batched = config.max_num_batched_tokens or BATCHED_TOKENS[machine.device]
    max_seqs = config.max_num_seqs or min(MAX_SEQS[machine.device], batched)
    if config.max_num_batched_tokens is None:
        reasons["max_num_batched_tokens"] = f"default on a {machine.device}"
    if config.deterministic:
        reasons["deterministic"] = _determinism(config, machine)
    length = _length(config, spec)
    if config.quantization != "auto":
        _check_quantization(config, dtype, machine)
    sizes = (block_size, batched, min(max_seqs, batched), length)
    offers, own = _offers(config, spec, machine, ITEM_BYTES[dtype], *sizes)
    request = Extent(offers[0].layout.near, block_size, batched)
    budget, reasons["kv_cache_memory_bytes"] = _cache_budget(config, own, offers)
    max_seqs, num_states = _states(config, max(offer.state_bytes for offer in offers), budget, max_seqs)
    num_rows = max_seqs + 1 + num_states
    wanted = max_seqs * request.num_blocks(length) + (SPARE_BLOCKS if config.enable_prefix_caching else 0)
    num_blocks = min(
        [wanted, *(offer.most_blocks(budget, num_rows) for offer in offers if offer.block_bytes)]
    )
    if num_blocks == wanted and config.kv_cache_memory_bytes is None:
        reasons["kv_cache_memory_bytes"] = (
            f"{max_seqs} sequences of {length} tokens, and finished ones to reuse"
        )
    per_block = max(offer.block_bytes for offer in offers)
    length, why = _fitting_length(config, length, request, num_blocks, per_block)
    reasons["max_model_len"] = why
    memories = tuple(offer.filled(num_blocks, num_rows, num_states) for offer in offers)
    depth_two = machine.asynchronous if config.async_scheduling is None else config.async_scheduling
    resolved = dataclasses.replace(
        config,
        device=machine.device,
        dtype=dtype,
        block_size=block_size,
        max_num_seqs=max_seqs,
        max_num_batched_tokens=batched,
        max_model_len=length,
        kv_cache_memory_bytes=max(memory.cache_bytes for memory in memories),
        async_scheduling=depth_two,
        max_token_gap_ms=_gap(config, machine, offline, reasons),
        num_threads=config.num_threads or machine.num_cores,
    )
    return Resolved(resolved, memories, reasons)


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank computes: its part of its stage's layers, and the parameters of that by name."""

    spec: Spec
    shapes: Mapping[str, tuple[int, ...]]
    has_head: bool


def _offers(
    config: Config,
    spec: Spec,
    machine: Machine,
    item_bytes: int,
    block_size: int,
    batched_tokens: int,
    num_rows: int,
    length: int,
) -> tuple[list[Memory], Machine]:
    """Where the memory of each stage's ranks goes before there is a cache, and what a rank has."""
    whole, own = _part(config, spec, machine, block_size, length)
    bits, parts = BITS.get(config.quantization), _stages(config, spec, whole)
    layouts = in_common([_layout(config, p.spec, machine, block_size, item_bytes, length) for p in parts])
    return [
        Memory(
            _weight_bytes(part, item_bytes, bits),
            _work_bytes(part.spec, spec.vocab_size, batched_tokens, num_rows, length),
            cache_bytes=0,
            layout=layout,
            num_blocks=0,
            state_bytes=state_bytes(part.spec, item_bytes),
        )
        for part, layout in zip(parts, layouts, strict=True)
    ], own


def _part(config: Config, spec: Spec, machine: Machine, block_size: int, length: int) -> tuple[Spec, Machine]:
    """What one rank of each layer computes, and has for it; all ranks have as much."""
    size, parts = config.tensor_parallel_size, config.decode_context_parallel_size
    if parts > 1 and isinstance(spec, Decoder):
        check_parts(spec, size, parts, block_size, length)
    part = shard(spec, size, 0, whole_experts(config, spec)) if isinstance(spec, Decoder) else spec
    num_beside = -(-size * config.pipeline_parallel_size // config.nnodes)
    return part, machine.part(num_beside)


def _stages(config: Config, spec: Spec, whole: Spec) -> list[Part]:
    """What the ranks of each stage compute of `whole`, a part of each layer of `spec`."""
    if not isinstance(spec, Decoder) or not isinstance(whole, Decoder):
        return [Part(whole, dict(parameter_shapes(whole)), has_head=True)]
    return [
        Part(layers_of(whole, stage), dict(stage_shapes(whole, stage)), has_head=stage.is_last)
        for stage in stages(spec, config.pipeline_parallel_size)
    ]


def whole_experts(config: Config, spec: Spec) -> WholeExperts | None:
    """How experts are spread over ranks; None if each is cut, or there is one rank.

    Raises:
        ConfigError: there are no experts, or none of ours.
    """
    if config.enable_eplb and (not config.enable_expert_parallel or config.deterministic):
        raise ConfigError(
            "enable_eplb is set, which moves whole experts between ranks, and their sums round otherwise then; it needs"
            " enable_expert_parallel, and deterministic to be left out"
        )
    if not config.enable_expert_parallel:
        return None
    if isinstance(spec, Foreign):
        raise ConfigError(
            "enable_expert_parallel is set, and Transformers' modules keep experts together; leave it out, or take a"
            " native architecture (`quire models`)"
        )
    if not any(isinstance(block.mlp, MoE) for block in spec.blocks):
        raise ConfigError(
            "enable_expert_parallel is set, and this network has no experts that could be spread over ranks; leave it"
            " out"
        )
    size = config.data_parallel_size * config.tensor_parallel_size
    if size == 1:
        return None
    spare, interval = (1, config.eplb_step_interval) if config.enable_eplb else (0, None)
    return WholeExperts(size, spare, config.all2all_backend, interval)


def _layout(
    config: Config, part: Spec, machine: Machine, block_size: int, item_bytes: int, length: int
) -> Layout:
    """Of a rank's part of a block."""
    own_size = block_size // config.decode_context_parallel_size
    return cache_layout(part, own_size, item_bytes, _quantizes_cache(config, machine), length)


def _check_quantization(config: Config, dtype: str, machine: Machine) -> None:
    if machine.device != "cpu":
        raise ConfigError(
            f"quantization is {config.quantization}, which is for CPUs, and the device is a {machine.device};"
            " leave it out, or use device cpu"
        )
    if dtype == "float16":
        raise ConfigError(
            f"quantization is {config.quantization}, whose products take bfloat16 or float32, and dtype is float16;"
            " use dtype bfloat16"
        )


def _quantizes_cache(config: Config, machine: Machine) -> bool:
    if config.kv_cache_dtype == "int8" and machine.device != "cpu":
        raise ConfigError(
            f"kv_cache_dtype is int8, which is for CPUs, and the device is a {machine.device}, which takes auto (the"
            " model's dtype); leave it out, or use device cpu"
        )
    return config.kv_cache_dtype == "int8"


def _weight_bytes(part: Part, item_bytes: int, bits: int | None) -> int:
    """Of quantized weights, their scales and a head beside a tied embedding included."""
    spec, shapes, num_head = part.spec, part.shapes, part.spec.dim * part.spec.vocab_size
    if bits is None:
        packed_head = isinstance(spec, Foreign) and spec.head not in shapes
        return (sum(map(prod, shapes.values())) + packed_head * num_head) * item_bytes
    total, head = 0.0, spec.head if isinstance(spec, Foreign) else HEAD
    for name, shape in shapes.items():
        if name == head or _is_quantized(spec, name, shape):
            total += prod(shape) * _bytes_of(8 if name == head else bits)
        else:
            total += prod(shape) * item_bytes
    return int(total + (num_head * _bytes_of(8) if part.has_head and head not in shapes else 0))


def _is_quantized(spec: Spec, name: str, shape: tuple[int, ...]) -> bool:
    if isinstance(spec, Foreign):
        return name in spec.products
    return name.startswith("layers.") and len(shape) == 2 and not name.endswith(UNQUANTIZED)


def _bytes_of(bits: int) -> float:
    """A number's, with its share of a scale, of which there is one a row or one, of two bytes, for 64 numbers."""
    return 1.0 if bits == 8 else bits / 8 + 2 / 64


def _determinism(config: Config, machine: Machine) -> str:
    if machine.device == "cpu":
        return "asked for; a CPU's kernels compute every row alike anyway"
    if not 0 <= config.max_logprobs <= EXACT_LOGPROBS:
        raise ConfigError(
            f"max_logprobs is {config.max_logprobs}; with deterministic on a {machine.device} it must be between 0 and"
            f" {EXACT_LOGPROBS}, since more are sums whose order depends on the batch"
        )
    return "asked for; attention and products take one form for any number of rows"


def _length(config: Config, spec: Spec) -> int:
    if config.max_model_len is None:
        return spec.max_length
    if config.max_model_len > spec.max_length:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}; this model was made for at most {spec.max_length} positions"
        )
    return config.max_model_len


def _work_bytes(spec: Spec, vocab_size: int, batched_tokens: int, num_rows: int, length: int) -> int:
    """Activations of the largest step and its logits, all of them, in float32 to be on the safe side."""
    if isinstance(spec, Foreign):
        num_heads = max((call.num_heads for call in spec.attention), default=0)
        beside = SCORES * num_heads * min(batched_tokens, length) * length if spec.alone else 0
        inside = [max(shape[-2:]) for name, shape in spec.parameters if name in spec.products - {spec.head}]
        widest = WIDE * max([spec.dim, *inside])
    else:
        widest = max(
            3 * spec.dim, *(_widest(part, spec.dim) for b in spec.blocks for part in (b.mixer, b.mlp))
        )
        beside = batched_tokens * (3 * layer_dims(spec) + _streams(spec))
    numbers = batched_tokens * (2 * spec.dim + 2 * widest) + beside + 3 * num_rows * vocab_size
    return 4 * numbers + _choice_bytes(spec, batched_tokens, length)


def _streams(spec: Decoder) -> int:
    """Numbers of a token in all streams, where there are several: as they are, and while they are predicted."""
    altup = spec.blocks[0].altup
    return 4 * altup.num * spec.dim if altup else 0


def _choice_bytes(spec: Spec, batched_tokens: int, length: int) -> int:
    """What each token of the largest step sees, where it is chosen, and the work of choosing."""
    count = num_chosen(spec, length)
    return 4 * batched_tokens * count + CHOICE_BYTES if count else 0


def _widest(part: Mixer | MLP | MoE | None, dim: int) -> int:
    match part:
        case MLP(hidden=hidden):
            return 2 * hidden
        case MoE(expert=expert, shared=shared, top_k=top_k):
            inside = 2 * (expert.hidden * top_k + (shared.hidden if shared else 0))
            return max(inside, (expert.hidden + dim) * top_k)
        case Mamba(channels=channels) | RGLRU(channels=channels):
            return 4 * channels
        case Both(states=states):
            return _widest(states, dim)
        case Guided(attention=attention, mlp=mlp, states=states):
            qkv = (attention.num_heads + 2 * attention.num_kv_heads) * attention.head_dim
            return max(_widest(states, dim), 2 * _widest(mlp, dim), 2 * qkv)  # with what is added
        case Mamba2(inner=inner, convolved=convolved):
            return 2 * (inner + convolved)
        case DeltaNet(num_k_heads=num_k, k_dim=k_dim, num_v_heads=num_v, v_dim=v_dim):
            return 4 * num_k * k_dim + num_v * (3 * v_dim + INVERSES)
        case KimiDelta(num_heads=heads, head_dim=size) | Lightning(num_heads=heads, head_dim=size):
            return 8 * heads * size
    return 0


def _cache_budget(config: Config, machine: Machine, offers: Sequence[Memory]) -> tuple[int, str]:
    """Bytes for the cache of each rank: as many as the fullest has left."""
    weights, work = max(offer.weight_bytes for offer in offers), max(offer.work_bytes for offer in offers)
    left = (
        min(int(machine.total_bytes * config.gpu_memory_utilization), machine.available_bytes)
        - weights
        - work
    )
    if left <= 0:
        raise CapacityError(
            f"the weights take {weights / 2**30:.2f} GiB and work space {work / 2**30:.2f} GiB; of"
            f" {machine.total_bytes / 2**30:.1f} GiB only {machine.available_bytes / 2**30:.1f} GiB are free at a"
            f" share of {config.gpu_memory_utilization}. Free memory, or lower max_num_batched_tokens or max_num_seqs"
        )
    if config.kv_cache_memory_bytes is not None:
        if config.kv_cache_memory_bytes > left:
            raise CapacityError(
                f"kv_cache_memory_bytes asks for {config.kv_cache_memory_bytes / 2**30:.2f} GiB;"
                f" {left / 2**30:.2f} GiB are left beside the weights"
            )
        return config.kv_cache_memory_bytes, "asked for"
    if machine.device == "cpu":
        return int(left * CPU_CACHE_SHARE), f"{CPU_CACHE_SHARE:.0%} of the memory left beside the weights"
    return left, "the memory left beside the weights"


def _states(config: Config, per_state: int, budget: int, max_seqs: int) -> tuple[int, int]:
    """How many sequences may run, whose states fit into half of the memory, and how many states are kept for others."""
    if not per_state:
        return max_seqs, 0
    most = int(budget * STATE_SHARE) // per_state - 1
    if most < (config.max_num_seqs or 1):
        raise CapacityError(
            f"the states of {config.max_num_seqs or 1} sequences take"
            f" {((config.max_num_seqs or 1) + 1) * per_state / 2**30:.2f} GiB, and {STATE_SHARE:.0%} of the cache's"
            f" {budget / 2**30:.2f} GiB is for them; lower max_num_seqs or raise kv_cache_memory_bytes"
        )
    max_seqs = min(max_seqs, most)
    left = budget - (max_seqs + 1) * per_state
    return max_seqs, min(int(left * STATE_SHARE) // per_state, SPARE_BLOCKS) * config.enable_prefix_caching


def _fitting_length(
    config: Config, length: int, request: Extent, num_blocks: int, per_block: int
) -> tuple[int, str]:
    room = request.longest(num_blocks)
    if room is None or length <= room:
        return length, "asked for" if config.max_model_len else "what the model was made for"
    if config.max_model_len is not None or room < 1:
        raise CapacityError(
            f"one request of {length} tokens needs {request.num_blocks(length) * per_block / 2**30:.2f} GiB of KV"
            f" cache, and there is room for {room} tokens; lower max_model_len or raise kv_cache_memory_bytes"
        )
    return room, f"the model was made for {length}, and the KV cache has room for {room}"


def _gap(config: Config, machine: Machine, offline: bool, reasons: dict[str, str]) -> float:
    if config.max_token_gap_ms is not None:
        return config.max_token_gap_ms
    if offline:
        reasons["max_token_gap_ms"] = "nobody reads along, so prompts are computed in the largest pieces"
        return 0.0
    reasons["max_token_gap_ms"] = f"default on a {machine.device}"
    return ONLINE_GAP_MS[machine.device]
