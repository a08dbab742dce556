"""From options to a ready engine core: read, resolve, load, allocate. The order is the start-up."""

import dataclasses
import hashlib
import os
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quire.attention.base import Backend, Cache
from quire.attention.select import select
from quire.attention.shapes import cache_shapes
from quire.checkpoint.source import resolve as find_model
from quire.config import Config
from quire.engine.announce import Announce
from quire.engine.core import EngineCore
from quire.engine.inputs import InputProcessor
from quire.engine.precompile import Job, Precompiler, compiled, fix_keys
from quire.engine.roads import take_road
from quire.engine.text import Text, model_config
from quire.errors import ConfigError
from quire.kernels import ops
from quire.kernels.gpu import gpu_of
from quire.layers.base import Network
from quire.layers.decoder import Decoder
from quire.log import logger
from quire.models.spec import Spec, num_chosen
from quire.platforms.base import Platform
from quire.platforms.cpu import return_memory
from quire.platforms.detect import detect
from quire.resolve import Machine, Resolved, resolve, resolve_dtype
from quire.runner.fixed import MOST_RECORDED, FixedSteps, why_not
from quire.runner.graphs import Graphs
from quire.runner.memory import allocate_cache
from quire.runner.mixed import MixedSteps, worthwhile
from quire.runner.recordings import Recordings
from quire.runner.runner import Runner
from quire.runner.state import SlotState
from quire.runner.states import StateRows
from quire.sampling.sampler import Sampler
from quire.scheduler.blocks import BlockPool
from quire.scheduler.checkpoints import Checkpoints
from quire.scheduler.near import Extent
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.trace import Recorder

MIN_PREFILL_TIME = 2.0  # over that of decoding sequences (Limits), unless max_token_gap_ms was asked for


@dataclass(frozen=True, slots=True)
class CoreParts:
    """The half of an engine that knows the device, and what was decided on the way to it."""

    config: Config  # resolved
    reasons: Mapping[str, str]
    spec: Spec
    core: EngineCore
    max_model_len: int
    summary: str  # one line
    start_s: float


def build(
    config: Config, text: Text, *, offline: bool, clock: Callable[[], float] = time.monotonic
) -> tuple[InputProcessor, CoreParts]:
    """Both halves of an engine that waits for requests, in one process.

    Raises:
        ConfigError, ModelError, CapacityError: naming the option, the file or the bytes that do not fit.
    """
    parts = build_core(config, offline=offline, clock=clock)
    logger.info("ready in %.1f s: %s", parts.start_s, parts.summary)
    for option, reason in sorted(parts.reasons.items()):
        logger.debug("%s: %s", option, reason)
    return text.inputs(vocab_size=parts.spec.vocab_size, max_model_len=parts.max_model_len), parts


def build_core(
    config: Config,
    *,
    offline: bool,
    clock: Callable[[], float] = time.monotonic,
    announce: Announce | None = None,
) -> CoreParts:
    """Everything from the model's files to a core that waits for token ids. Reads no tokenizer.

    Args:
        offline: nobody reads tokens as they come.
        announce: called with the requests that enter and leave the batch, before the device is touched.

    Raises:
        ConfigError, ModelError, CapacityError: naming the option, the file or the bytes that do not fit.
    """
    begin = time.perf_counter()
    folder = find_model(
        config.model,
        config.revision,
        weights=config.load_format != "dummy",
        download_dir=config.download_dir,
    ).folder
    raw = model_config(config, folder)
    road = take_road(raw, config)
    spec = road.spec
    platform = detect(config.device)
    if config.data_parallel_size > 1 and platform.name != "cpu":
        raise ConfigError(
            f"data_parallel_size is {config.data_parallel_size}, and all groups would be at one {platform.name} device;"
            " start a server for each device (CUDA_VISIBLE_DEVICES), and quire router in front of them"
        )
    machine, stored = machine_of(platform).part(config.data_parallel_size), dtype_of(raw)
    backend = _backend(config, platform, resolve_dtype(config, stored, machine)[0])
    machine = dataclasses.replace(machine, block_size=backend.block_size)
    resolved = resolve(config, spec, machine, checkpoint_dtype=stored, offline=offline)
    config = resolved.config
    torch.set_num_threads(config.num_threads or 1)
    _check_deterministic(config, platform.device)
    model = road.network(config, backend, platform.device)
    ahead = _compile_ahead(resolved, raw, model)
    road.load(model, config, folder)
    return_memory()
    core = _core(resolved, spec, model, platform.device, clock, announce)
    if ahead is not None:
        weakref.finalize(core, ahead.close)
    return CoreParts(
        config,
        resolved.reasons,
        spec,
        core,
        max_model_len=config.max_model_len or spec.max_length,
        summary=_summary(resolved, spec, backend, platform),
        start_s=time.perf_counter() - begin,
    )


def dtype_of(raw: Mapping[str, Any]) -> str | None:
    """What config.json says the weights are, at the top or in the text model's part."""
    for part in (raw, raw.get("text_config") or {}):
        if dtype := part.get("dtype") or part.get("torch_dtype"):
            return str(dtype)
    return None


def machine_of(platform: Platform) -> Machine:
    """The facts that options follow from, before the attention backend has named its block size."""
    best = str(platform.default_dtype).removeprefix("torch.")
    asynchronous = platform.name == "cuda"
    return Machine(
        device=platform.name,
        total_bytes=platform.total_bytes,
        available_bytes=platform.available_bytes,
        num_cores=platform.num_threads,
        fast_dtypes=tuple(dict.fromkeys((best, "float16" if asynchronous else "float32"))),
        block_size=1,
        asynchronous=asynchronous,
    )


def _backend(config: Config, platform: Platform, dtype: str) -> Backend:
    return select(
        platform.attention_order,
        getattr(torch, dtype),
        platform.device,
        forced=None if config.attention_backend == "auto" else config.attention_backend,
        block_size=config.block_size,
        invariant=config.deterministic,
        quantized=config.kv_cache_dtype == "int8",
    )


def _check_deterministic(config: Config, device: torch.device) -> None:
    if config.deterministic and (reason := ops.why_not_invariant(device, getattr(torch, config.dtype))):
        raise ConfigError(f"deterministic cannot be had here: {reason}")


def _compile_ahead(resolved: Resolved, raw: Mapping[str, Any], model: Network) -> Precompiler | None:
    """Have the kernels of steps compiled by processes that run beside what follows, unless an engine has before."""
    config, build = resolved.config, model.build
    gpu = gpu_of(build.device)
    if gpu is None or model.backend.name != "triton" or not isinstance(model, Decoder):
        return None
    from quire.kernels.triton.cache import keep_kernels  # Triton is only where there are GPUs

    kernels = keep_kernels()
    fix_keys()
    length = config.max_model_len or model.spec.max_length
    if why_not(model, build.device) is not None or num_chosen(model.spec, length):
        return None
    job = Job(
        raw=raw,
        dtype=config.dtype,
        block_size=model.backend.block_size,
        max_seqs=config.max_num_seqs or 1,
        max_length=length,
        max_batched_tokens=config.max_num_batched_tokens or 1,
        gpu=gpu,
        invariant=config.deterministic,
    )
    done = compiled(job, kernels)
    return None if done.exists() else Precompiler(job, done)


def _repeated(
    parts: tuple[Network, list[Cache], SlotState, Sampler], config: Config, *, keeps_states: bool
) -> tuple[FixedSteps | None, MixedSteps | None]:
    """How steps of newest tokens, and small ones of any, are computed again by one call; None if they are not."""
    model, _, state, _ = parts
    block_size, device = config.block_size or 1, state.tokens.device
    if not isinstance(model, Decoder):
        logger.info("steps are computed operation by operation: others' modules are not recorded")
    elif num_chosen(model.spec, state.max_length):  # each step's scores are as wide as its longest sequence
        logger.info(
            "steps are computed operation by operation: attention to chosen positions is not recorded"
        )
    elif model.backend.name == "cpu":
        sizes, recordings = range(1, MOST_RECORDED + 1), Recordings(keeps_states=keeps_states)
        return FixedSteps(*parts, block_size=block_size, graphs=recordings, sizes=sizes), None
    elif (reason := why_not(model, device)) is None:
        fixed = FixedSteps(*parts, block_size=block_size, graphs=Graphs(keeps_states=keeps_states))
        return fixed, MixedSteps(fixed, min(config.max_num_batched_tokens or 1, worthwhile(model.spec)))
    elif device.type == "cuda":
        logger.info("decode steps are no CUDA graphs: %s", reason)
    return None, None


def _core(
    resolved: Resolved,
    spec: Spec,
    model: Network,
    device: torch.device,
    clock: Callable[[], float],
    announce: Announce | None,
) -> EngineCore:
    config, memory = resolved.config, resolved.memory
    max_seqs, length, block_size = config.max_num_seqs, config.max_model_len, config.block_size
    if max_seqs is None or length is None or block_size is None or config.max_num_batched_tokens is None:
        raise ConfigError("the options are not resolved")
    cache = allocate_cache(memory.num_blocks, memory.block_bytes, device)
    near, beside = memory.layout.near, None
    if near is not None and near.parts:
        beside = torch.zeros(near.parts, memory.num_blocks, dtype=torch.int32, device=device)
    state = SlotState(max_seqs, length, block_size, device, beside)
    states = None
    if memory.state_bytes:
        states = allocate_cache(max_seqs + 1 + memory.num_states, memory.state_bytes, device)
    parts = (
        model,
        model.caches(cache, states, memory.layout),
        state,
        Sampler(spec.vocab_size, state.tokens),
    )
    fixed, mixed = _repeated(parts, config, keeps_states=states is not None)
    rows = None if states is None else StateRows(states)
    runner = Runner(*parts, block_size=block_size, fixed=fixed, mixed=mixed, states=rows)
    secret = os.urandom(16)  # nobody outside can predict which prompts share a block
    pool = BlockPool(
        memory.num_blocks, block_size, secret=secret, caching=config.enable_prefix_caching, near=near
    )
    scheduler = Scheduler(
        pool,
        max_batched_tokens=config.max_num_batched_tokens,
        max_seqs=max_seqs,
        max_length=length,
        max_gap_s=config.max_token_gap_ms / 1000 if config.max_token_gap_ms else None,
        min_prefill_time=MIN_PREFILL_TIME if "max_token_gap_ms" in resolved.reasons else 0.0,
        checkpoints=None if states is None else Checkpoints(range(max_seqs + 1, len(states))),
    )
    return EngineCore(
        scheduler if config.trace_file is None else Recorder(scheduler, Path(config.trace_file)),
        runner,
        depth=2 if config.async_scheduling else 1,
        seed=config.seed,
        fingerprint=hashlib.blake2b(config.model.encode(), digest_size=16).digest(),
        share_across_requests=config.enable_prefix_caching,
        vocab_size=spec.vocab_size,
        clock=clock,
        announce=announce,
    )


def _summary(resolved: Resolved, spec: Spec, backend: Backend, platform: Platform) -> str:
    config, memory, gib = resolved.config, resolved.memory, 2**30
    length = config.max_model_len or 1
    request = Extent(memory.layout.near, config.block_size or 1, max_batched_tokens=1)  # that decodes
    num_requests = memory.num_blocks // request.num_blocks(length)
    num_tokens = num_requests * length if memory.layout.near else memory.num_blocks * request.block_size
    quantized = "" if config.quantization == "auto" else f" with {config.quantization} weights"
    cached = "" if config.kv_cache_dtype == "auto" else f" in {config.kv_cache_dtype}"
    ends = f", at ends of blocks of {config.block_size} tokens" if memory.num_states else ""
    kept = f", states of {memory.state_bytes / 2**20:.2f} MiB, {memory.num_states} kept{ends}"
    where = platform.name
    if where == "cpu":
        where += f" ({config.num_threads} threads, {platform.num_nodes} memory node{'s' * (platform.num_nodes > 1)})"
    groups = "" if (n := config.data_parallel_size) == 1 else f"{n} engine groups, each with "
    return (
        f"{groups}{len(cache_shapes(spec))} layers in {config.dtype}{quantized} on {where}, attention {backend.name},"
        f" weights {memory.weight_bytes / gib:.2f} GiB, KV cache{cached} {memory.cache_bytes / gib:.2f} GiB ="
        f" {num_tokens} tokens ({num_requests} requests of {length})" + (kept if memory.state_bytes else "")
    )
