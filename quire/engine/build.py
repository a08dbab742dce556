"""From options to a ready engine core: read, resolve, load, allocate. The order is the start-up."""

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quire.attention.base import Backend
from quire.attention.shapes import cache_shapes
from quire.config import Config
from quire.engine.announce import Announce
from quire.engine.core import EngineCore
from quire.engine.device import backend_of, dtype_of, find, machine_of, make_runner, mesh_of, platform_of
from quire.engine.inputs import InputProcessor
from quire.engine.ranks import Ranks, Team, spawn
from quire.engine.site import located
from quire.engine.text import Text
from quire.errors import ConfigError
from quire.log import logger
from quire.models.spec import Spec
from quire.parallel.axis import Axes
from quire.platforms.base import Platform
from quire.platforms.cpu import stay_on
from quire.resolve import Memory, Resolved, resolve, resolve_dtype
from quire.runner.runner import Runner
from quire.scheduler.blocks import BlockPool
from quire.scheduler.checkpoints import Checkpoints
from quire.scheduler.limits import Limits
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
    """Both halves of an engine that waits for requests, in this process; other ranks get processes of their own.

    Raises:
        ConfigError, ModelError, CapacityError: naming the option, the file or the bytes that do not fit.
    """
    config = located(config)
    ranks = spawn(config)
    try:
        parts = build_core(config, offline=offline, clock=clock, ranks=ranks)
    except BaseException:
        if ranks is not None:
            ranks.close()
        raise
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
    ranks: Ranks | None = None,
    group: int = 0,
) -> CoreParts:
    """Everything from the model's files to a core that waits for token ids. Reads no tokenizer.

    Args:
        offline: nobody reads tokens as they come.
        announce: called with the requests that enter and leave the batch, before the device is touched.
        ranks: the other processes that compute the network, as many as the config says; they have just been started.
        group: which of several independent groups this is; a GPU of its own follows from that.

    Raises:
        ConfigError, ModelError, CapacityError: naming the option, the file or the bytes that do not fit.
    """
    begin = time.perf_counter()
    found, platform = find(config), platform_of(config, ranks.seat.index if ranks else group)
    machine, stored = machine_of(platform).part(config.data_parallel_size), dtype_of(found.raw)
    backend = backend_of(config, platform, resolve_dtype(config, stored, machine)[0])
    # All ranks' parts of a block together.
    block_size = backend.block_size * config.decode_context_parallel_size
    machine = dataclasses.replace(machine, block_size=block_size)
    resolved = resolve(config, found.spec, machine, checkpoint_dtype=stored, offline=offline)
    config = resolved.config
    axes = ranks.join(config, resolved.memories, platform.device) if ranks else Axes()
    if ranks and platform.processors:  # the caller's process may be one that goes on afterwards
        ranks.ends.callback(stay_on, os.sched_getaffinity(0))
    runner = make_runner(found, config, resolved.memory, platform, backend, axes)
    if ranks:
        ranks.wait()
    core = _core(resolved, found.spec, Team(runner, ranks) if ranks else runner, clock, announce)
    return CoreParts(
        config,
        resolved.reasons,
        found.spec,
        core,
        max_model_len=config.max_model_len or found.spec.max_length,
        summary=_summary(resolved, found.spec, backend, platform),
        start_s=time.perf_counter() - begin,
    )


def _core(
    resolved: Resolved,
    spec: Spec,
    runner: Runner | Team,
    clock: Callable[[], float],
    announce: Announce | None,
) -> EngineCore:
    config, memory = resolved.config, resolved.memory
    max_seqs, length, block_size = config.max_num_seqs, config.max_model_len, config.block_size
    if max_seqs is None or length is None or block_size is None or config.max_num_batched_tokens is None:
        raise ConfigError("the options are not resolved")
    secret = os.urandom(16)  # nobody outside can predict which prompts share a block
    pool = BlockPool(
        memory.num_blocks,
        block_size,
        secret=secret,
        caching=config.enable_prefix_caching,
        near=memory.layout.near,
    )
    limits = Limits(
        max_batched_tokens=config.max_num_batched_tokens,
        max_seqs=max_seqs,
        max_length=length,
        max_gap_s=config.max_token_gap_ms / 1000 if config.max_token_gap_ms else None,
        min_prefill_time=MIN_PREFILL_TIME if "max_token_gap_ms" in resolved.reasons else 0.0,
        stages=config.pipeline_parallel_size,
    )
    scheduler = Scheduler(pool, limits, checkpoints=_checkpoints(resolved.memories, max_seqs))
    return EngineCore(
        scheduler if config.trace_file is None else Recorder(scheduler, Path(config.trace_file)),
        runner,
        depth=max(2 if config.async_scheduling else 1, config.pipeline_parallel_size),
        seed=config.seed,
        fingerprint=hashlib.blake2b(config.model.encode(), digest_size=16).digest(),
        share_across_requests=config.enable_prefix_caching,
        vocab_size=spec.vocab_size,
        clock=clock,
        announce=announce,
    )


def _checkpoints(memories: Sequence[Memory], max_seqs: int) -> Checkpoints | None:
    """Rows of states that are kept: those after the slots' and nobody's."""
    first = max_seqs + 1
    keeps = any(memory.state_bytes for memory in memories)
    return Checkpoints(range(first, first + memories[0].num_states)) if keeps else None


def _summary(resolved: Resolved, spec: Spec, backend: Backend, platform: Platform) -> str:
    config, memory = resolved.config, resolved.memory
    weights = _gib(memory.weight_bytes for memory in resolved.memories)
    cache = _gib(memory.cache_bytes for memory in resolved.memories)
    length = config.max_model_len or 1
    request = Extent(memory.layout.near, config.block_size or 1, max_batched_tokens=1)  # that decodes
    num_requests = memory.num_blocks // request.num_blocks(length)
    num_tokens = num_requests * length if memory.layout.near else memory.num_blocks * request.block_size
    quantized = "" if config.quantization == "auto" else f" with {config.quantization} weights"
    cached = "" if config.kv_cache_dtype == "auto" else f" in {config.kv_cache_dtype}"
    ends = f", at ends of blocks of {config.block_size} tokens" if memory.num_states else ""
    state_bytes = sum(memory.state_bytes for memory in resolved.memories)
    kept = f", states of {state_bytes / 2**20:.2f} MiB, {memory.num_states} kept{ends}"
    where, size, each = platform.name, mesh_of(config).size, ""
    if where == "cpu":
        nodes = f"{platform.num_nodes} memory nodes" if platform.num_nodes > 1 else "1 memory node"
        stays = ", of which each rank stays on one" if platform.processors else ""
        where += f" ({config.num_threads} threads, {nodes}{stays})"
    if size > 1:
        where, each = f"{where} by {size} ranks", " a rank"
    if (parts := config.decode_context_parallel_size) > 1:
        each += f", of whose tokens each of {parts} has a part,"
    groups = "" if (n := config.data_parallel_size) == 1 else f"{n} engine groups, each with "
    return (
        f"{groups}{len(cache_shapes(spec))} layers in {config.dtype}{quantized} on {where}, attention {backend.name},"
        f" weights {weights} GiB{each}, KV cache{cached} {cache} GiB{each}"
        f" = {num_tokens} tokens ({num_requests} requests of {length})" + (kept if state_bytes else "")
    )


def _gib(sizes: Iterable[int]) -> str:
    """The only size, or the least and the greatest."""
    found = sorted(sizes)
    return " to ".join(dict.fromkeys(f"{size / 2**30:.2f}" for size in (found[0], found[-1])))
