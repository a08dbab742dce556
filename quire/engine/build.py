"""From options to a ready engine: read, resolve, load, allocate. The order is the start-up."""

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quire.attention.base import Backend
from quire.attention.select import select
from quire.checkpoint.dummy import DummyCheckpoint
from quire.checkpoint.files import read_config, read_generation_config
from quire.checkpoint.reader import Checkpoint
from quire.checkpoint.source import resolve as find_model
from quire.config import Config
from quire.engine.core import EngineCore
from quire.engine.inputs import InputProcessor
from quire.errors import ConfigError
from quire.layers.decoder import Decoder
from quire.log import logger
from quire.models.names import Names
from quire.models.parameters import parameter_shapes
from quire.models.registry import decoder_spec
from quire.models.spec import Decoder as DecoderSpec
from quire.platforms.base import Platform
from quire.platforms.detect import detect
from quire.resolve import Machine, Resolved, resolve, resolve_dtype
from quire.runner.memory import allocate_cache
from quire.runner.runner import Runner
from quire.runner.state import SlotState
from quire.sampling.sampler import Sampler
from quire.scheduler.blocks import BlockPool
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.trace import Recorder
from quire.text.chat import ChatTemplate
from quire.text.generation import default_sampling, end_tokens
from quire.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Parts:
    """What an engine is made of."""

    config: Config
    reasons: Mapping[str, str]
    spec: DecoderSpec
    tokenizer: Tokenizer | None
    inputs: InputProcessor
    core: EngineCore


def build(config: Config, *, offline: bool, clock: Callable[[], float] = time.monotonic) -> Parts:
    """Everything from the model's files to an engine that waits for requests.

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
    raw = {**read_config(folder), **(config.hf_overrides or {})}
    spec, names = decoder_spec(raw)
    tokenizer = _tokenizer(config, folder)
    platform = detect(config.device)
    machine, stored = machine_of(platform), dtype_of(raw)
    backend = _backend(config, platform, resolve_dtype(config, stored, machine)[0])
    machine = dataclasses.replace(machine, block_size=backend.block_size)
    resolved = resolve(config, spec, machine, checkpoint_dtype=stored, offline=offline)
    config = resolved.config
    torch.set_num_threads(config.num_threads or 1)
    model = _load(config, spec, names, folder, backend, platform.device)
    core = _core(resolved, spec, model, platform.device, clock)
    inputs = _inputs(config, spec, folder, raw, tokenizer)
    _report(resolved, spec, backend, time.perf_counter() - begin)
    return Parts(config, resolved.reasons, spec, tokenizer, inputs, core)


def dtype_of(raw: Mapping[str, Any]) -> str | None:
    """What config.json says the weights are, at the top or in the text model's part."""
    for part in (raw, raw.get("text_config") or {}):
        if dtype := part.get("dtype") or part.get("torch_dtype"):
            return str(dtype)
    return None


def _tokenizer(config: Config, folder: Path) -> Tokenizer | None:
    if config.skip_tokenizer_init:
        return None
    if config.tokenizer is None:
        return Tokenizer.load(folder)
    return Tokenizer.load(
        find_model(config.tokenizer, weights=False, download_dir=config.download_dir).folder
    )


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
    )


def _load(
    config: Config, spec: DecoderSpec, names: Names, folder: Path, backend: Backend, device: torch.device
) -> Decoder:
    dtype = getattr(torch, config.dtype)
    model = Decoder(spec, backend=backend, dtype=dtype, device=device, max_length=config.max_model_len)
    if config.load_format == "dummy":
        model.load(DummyCheckpoint(config.seed, dtype))
        return model
    checkpoint = Checkpoint(folder, names)
    checkpoint.check(parameter_shapes(spec))  # before the first byte of weights is read
    model.load(checkpoint)
    checkpoint.finish()
    return model


def _core(
    resolved: Resolved,
    spec: DecoderSpec,
    model: Decoder,
    device: torch.device,
    clock: Callable[[], float],
) -> EngineCore:
    config, memory = resolved.config, resolved.memory
    max_seqs, length, block_size = config.max_num_seqs, config.max_model_len, config.block_size
    if max_seqs is None or length is None or block_size is None or config.max_num_batched_tokens is None:
        raise ConfigError("the options are not resolved")
    cache = allocate_cache(memory.num_blocks, memory.block_bytes, device)
    runner = Runner(
        model,
        model.caches(cache),
        SlotState(max_seqs, length, block_size, device),
        Sampler(spec.vocab_size, max_seqs, device),
        block_size=block_size,
    )
    secret = os.urandom(16)  # nobody outside can predict which prompts share a block
    pool = BlockPool(memory.num_blocks, block_size, secret=secret, caching=config.enable_prefix_caching)
    scheduler = Scheduler(
        pool,
        max_batched_tokens=config.max_num_batched_tokens,
        max_seqs=max_seqs,
        max_length=length,
        max_gap_s=config.max_token_gap_ms / 1000 if config.max_token_gap_ms else None,
    )
    return EngineCore(
        scheduler if config.trace_file is None else Recorder(scheduler, Path(config.trace_file)),
        runner,
        depth=2 if config.async_scheduling else 1,
        seed=config.seed,
        fingerprint=hashlib.blake2b(config.model.encode(), digest_size=16).digest(),
        share_across_requests=config.enable_prefix_caching,
        clock=clock,
    )


def _inputs(
    config: Config, spec: DecoderSpec, folder: Path, raw: Mapping[str, Any], tokenizer: Tokenizer | None
) -> InputProcessor:
    generation = read_generation_config(folder) if config.generation_config == "auto" else {}
    defaults = default_sampling({**generation, **(config.override_generation_config or {})})
    return InputProcessor(
        tokenizer,
        None if tokenizer is None else ChatTemplate.of(tokenizer, config.chat_template),
        vocab_size=spec.vocab_size,
        max_length=config.max_model_len or spec.max_length,
        max_logprobs=config.max_logprobs,
        eos_token_ids=end_tokens(generation, raw, tokenizer),
        defaults=defaults,
    )


def _report(resolved: Resolved, spec: DecoderSpec, backend: Backend, seconds: float) -> None:
    config, memory = resolved.config, resolved.memory
    gib = 2**30
    logger.info(
        "ready in %.1f s: %d layers in %s on %s, attention %s, weights %.2f GiB, KV cache %.2f GiB = %d tokens"
        " (%d requests of %d)",
        seconds,
        len(spec.blocks),
        config.dtype,
        config.device,
        backend.name,
        memory.weight_bytes / gib,
        memory.cache_bytes / gib,
        memory.num_blocks * (config.block_size or 1),
        memory.num_blocks * (config.block_size or 1) // (config.max_model_len or 1),
        config.max_model_len,
    )
    for option, reason in sorted(resolved.reasons.items()):
        logger.debug("%s: %s", option, reason)
