"""One rank's half of an engine: from the model's files to a runner of this process's share. Knows no scheduler."""

import dataclasses
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quire.attention.base import Backend, Cache
from quire.attention.select import select
from quire.checkpoint.source import resolve as find_model
from quire.config import Config
from quire.engine.precompile import Job, Precompiler, compiled, fix_keys
from quire.engine.roads import Road, take_road
from quire.engine.text import model_config, read_tokens
from quire.engine.ticks import in_lockstep
from quire.errors import ConfigError
from quire.grammar.matchers import Matchers
from quire.kernels import ops
from quire.kernels.gpu import gpu_of
from quire.layers.base import Network
from quire.layers.decoder import Decoder
from quire.log import logger
from quire.models.spec import Spec, num_chosen
from quire.parallel.axis import Axes
from quire.parallel.mesh import Mesh
from quire.platforms.base import Platform
from quire.platforms.cpu import return_memory, stay_on
from quire.platforms.detect import detect
from quire.resolve import Machine, Memory
from quire.runner.chunks import ChunkSteps
from quire.runner.fixed import MOST_RECORDED, FixedSteps, why_not
from quire.runner.graphs import Graphs
from quire.runner.memory import allocate_cache
from quire.runner.mixed import MixedSteps, worthwhile
from quire.runner.recordings import Recordings
from quire.runner.runner import Runner
from quire.runner.state import SlotState
from quire.runner.states import StateRows
from quire.sampling.sampler import Sampler
from quire.text.tokenizer import Tokenizer

MOST_MASK_THREADS = 8


@dataclass(frozen=True, slots=True)
class Found:
    """A model's files, and the road to its network."""

    folder: Path
    raw: Mapping[str, Any]  # config.json
    road: Road

    @property
    def spec(self) -> Spec:
        return self.road.spec


def find(config: Config) -> Found:
    """Read what the model is.

    Raises:
        ConfigError, ModelError: it is unknown, or not to be had as asked.
    """
    folder = find_model(
        config.model,
        config.revision,
        weights=config.load_format != "dummy",
        download_dir=config.download_dir,
    ).folder
    raw = model_config(config, folder)
    return Found(folder, raw, take_road(raw, config))


def mesh_of(config: Config) -> Mesh:
    """The ranks of an engine group.

    Raises:
        ConfigError: a size is not of whole ranks.
    """
    size, cp = config.tensor_parallel_size, config.decode_context_parallel_size
    if size % cp:
        raise ConfigError(
            f"decode_context_parallel_size is {cp}; it must divide tensor_parallel_size, {size}, whose ranks it puts to"
            " use"
        )
    return Mesh(tp=size // cp, cp=cp, pp=config.pipeline_parallel_size)


def world_of(config: Config) -> Mesh:
    """All ranks that exchange tensors: of one engine group, or of all that compute in lockstep."""
    mesh = mesh_of(config)
    return dataclasses.replace(mesh, dp=config.data_parallel_size) if in_lockstep(config) else mesh


def platform_of(config: Config, index: int = 0) -> Platform:
    """A rank's device: the GPU of that number (see `Seat`), or its part of the CPU that all of its machine share.

    Raises:
        ConfigError: there is none for every rank of this machine.
    """
    size = mesh_of(config).size * config.data_parallel_size
    placed = is_placed(config)
    if size == 1 or config.device == "cpu" or not torch.cuda.is_available():
        return detect(config.device, index, 1 if placed else size // config.nnodes)
    needed = index + 1 if placed else size // config.nnodes
    if (count := torch.cuda.device_count()) < needed:
        raise ConfigError(
            f"there are {needed} ranks on this machine, and {count} GPUs, of which each needs one; lower the sizes of"
            " axes (data_parallel_size, tensor_parallel_size), raise nnodes, or use device cpu"
        )
    return detect(f"cuda:{index}")


def is_placed(config: Config) -> bool:
    """Whether Ray places the ranks, each of which then sees no GPU but its own."""
    return config.distributed_executor_backend == "ray" and mesh_of(config).size > 1


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


def backend_of(config: Config, platform: Platform, dtype: str) -> Backend:
    """How attention is computed there.

    Raises:
        ConfigError: it is not; the message says why.
    """
    parts = config.decode_context_parallel_size
    if config.block_size is not None and config.block_size % parts:
        raise ConfigError(
            f"block_size is {config.block_size}; it must be a multiple of decode_context_parallel_size, {parts}, whose"
            " ranks have a part of each block"
        )
    return select(
        platform.attention_order,
        getattr(torch, dtype),
        platform.device,
        forced=None if config.attention_backend == "auto" else config.attention_backend,
        block_size=config.block_size and config.block_size // parts,
        invariant=config.deterministic,
        quantized=config.kv_cache_dtype == "int8",
        divisible=parts > 1,
    )


def _check_deterministic(config: Config, device: torch.device) -> None:
    if config.deterministic and (size := world_of(config).size) > 1 and device.type != "cpu":
        raise ConfigError(
            f"deterministic is set, and there are {size} ranks (tensor_parallel_size, ...) on {device.type} devices,"
            " whose sums over ranks may differ with the batch; leave it out, or have one rank"
        )
    if config.deterministic and (reason := ops.why_not_invariant(device, getattr(torch, config.dtype))):
        raise ConfigError(f"deterministic cannot be had here: {reason}")


def _compile_ahead(config: Config, raw: Mapping[str, Any], model: Network) -> Precompiler | None:
    """Have the kernels of steps compiled by processes that run beside what follows, unless an engine has before."""
    build = model.build
    gpu = gpu_of(build.device)
    if (
        gpu is None
        or model.axes.world.size > 1
        or model.backend.name != "triton"
        or not isinstance(model, Decoder)
    ):
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
) -> tuple[FixedSteps | None, MixedSteps | ChunkSteps | None]:
    """How steps of newest tokens, and small ones of any, are computed again by one call; None if they are not."""
    model, _, state, _ = parts
    block_size, device = config.block_size or 1, state.tokens.device
    if not isinstance(model, Decoder):
        logger.info("steps are computed operation by operation: others' modules are not recorded")
    elif num_chosen(model.spec, state.max_length):  # each step's scores are as wide as its longest sequence
        logger.info(
            "steps are computed operation by operation: attention to chosen positions is not recorded"
        )
    elif not model.axes.are_repeatable:
        logger.info("steps are computed operation by operation: ranks exchange tensors through the network")
    elif model.axes.dp.size > 1:
        logger.info(
            "steps are computed operation by operation: their sizes depend on other engine groups' steps"
        )
    elif model.backend.name == "cpu":
        sizes, recordings = range(1, MOST_RECORDED + 1), Recordings(model.axes, keeps_states=keeps_states)
        fixed = FixedSteps(*parts, block_size=block_size, graphs=recordings, sizes=sizes)
        if keeps_states or model.axes.pp.size > 1:
            return fixed, None
        return fixed, ChunkSteps(fixed, recordings, config.max_num_batched_tokens or 1)
    elif device.type == "cuda" and (model.axes.tp.size < model.axes.world.size or model.build.spreading):
        logger.info(
            "steps are computed operation by operation: of ranks, those along tp alone have CUDA graphs"
        )
    elif (reason := why_not(model, device)) is None:
        graphs = Graphs(model.axes, keeps_states=keeps_states)
        fixed = FixedSteps(*parts, block_size=block_size, graphs=graphs)
        return fixed, MixedSteps(fixed, min(config.max_num_batched_tokens or 1, worthwhile(model.spec)))
    elif device.type == "cuda":
        logger.info("decode steps are no CUDA graphs: %s", reason)
    return None, None


def make_runner(
    found: Found, config: Config, memory: Memory, platform: Platform, backend: Backend, axes: Axes
) -> Runner:
    """Load the weights of this rank and allocate its cache; `config` is resolved.

    Raises:
        ConfigError, CheckpointError: the network cannot be had as asked, or not from these files.
    """
    device = platform.device
    torch.set_num_threads(max((config.num_threads or 1) * config.nnodes // mesh_of(config).size, 1))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if platform.processors:
        stay_on(platform.processors)
    _check_deterministic(config, device)
    model = found.road.network(config, backend, device, axes)
    ahead = _compile_ahead(config, found.raw, model)
    found.road.load(model, config, found.folder)
    return_memory()
    runner = _runner(config, memory, model, device, _grammars(found, config))
    if ahead is not None:
        weakref.finalize(runner, ahead.close)
    return runner


def _grammars(found: Found, config: Config) -> Matchers:
    """As many threads as a step has, a few at most: on a CPU masks are made while its forward pass runs."""

    def load() -> tuple[Tokenizer, Collection[int]]:
        tokenizer, ends = read_tokens(config, found.folder, found.raw)
        if tokenizer is None:
            raise ConfigError("grammars need a tokenizer; start without skip_tokenizer_init")
        return tokenizer, ends

    return Matchers(load, found.spec.vocab_size, min(torch.get_num_threads(), MOST_MASK_THREADS))


def _runner(
    config: Config, memory: Memory, model: Network, device: torch.device, grammars: Matchers
) -> Runner:
    max_seqs, length, block_size = config.max_num_seqs, config.max_model_len, config.block_size
    if max_seqs is None or length is None or block_size is None:
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
        Sampler(model.vocabulary, state.tokens),
    )
    fixed, mixed = _repeated(parts, config, keeps_states=states is not None)
    rows = None if states is None else StateRows(states)
    return Runner(*parts, grammars=grammars, fixed=fixed, mixed=mixed, states=rows)
