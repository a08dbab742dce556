"""Runs a workload with Transformers' generate, for comparison: greedy, in padded batches, of fixed length."""

import time
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from quire.checkpoint.files import read_config
from quire.checkpoint.source import resolve
from quire.cli.workload import Workload
from quire.config import Config
from quire.engine.device import dtype_of, machine_of
from quire.errors import ConfigError
from quire.models.registry import decoder_spec
from quire.models.spec import Spec
from quire.platforms.detect import detect
from quire.resolve import resolve_dtype

PAD = 0


class Transformers:
    """A model of Transformers, run in batches of at most `batch_size`; None is one batch for all."""

    def __init__(self, options: Mapping[str, Any], batch_size: int | None):
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"hf_max_batch_size is {batch_size}; it must be at least 1")
        config = Config.of(**options)
        if config.quantization != "auto":
            raise ConfigError(
                f"quantization is {config.quantization}; the backend hf runs weights as they are: leave it out"
            )
        if config.kv_cache_dtype != "auto":
            raise ConfigError(
                f"kv_cache_dtype is {config.kv_cache_dtype}; the backend hf keeps keys and values in the model's dtype,"
                " auto: leave it out"
            )
        for axis in ("tensor_parallel_size", "pipeline_parallel_size"):
            if (size := vars(config)[axis]) > 1:
                raise ConfigError(f"{axis} is {size}; the backend hf is one process: leave it out")
        folder = resolve(config.model, config.revision).folder
        platform = detect(config.device)
        raw = read_config(folder)
        name, _ = resolve_dtype(config, dtype_of(raw), machine_of(platform))  # as the engine chooses
        dtype = getattr(torch, name)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.batch_size, self.device = batch_size, platform.device
        self.config = replace(config, device=platform.name, dtype=name, block_size=None)
        self.spec: Spec = decoder_spec(raw)[0]
        if config.load_format == "dummy":
            torch.manual_seed(config.seed)
            shape = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(shape, dtype=dtype, trust_remote_code=False)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
        self.model = model.to(self.device).eval()

    @torch.inference_mode()
    def run(self, work: Workload, *, show: bool) -> float:
        """Generate everything; returns the seconds it took. A batch runs until its longest output is done."""
        rows = [row for row in zip(work.prompts, work.output_lens, strict=True) for _ in range(work.n)]
        size = self.batch_size or len(rows)
        start = time.perf_counter()
        for begin in range(0, len(rows), size):
            self._generate(rows[begin : begin + size])
        return time.perf_counter() - start

    def _generate(self, rows: list[tuple[tuple[int, ...], int]]) -> None:
        width, steps = max(len(p) for p, _ in rows), max(k for _, k in rows)
        tokens = torch.tensor([[PAD] * (width - len(p)) + list(p) for p, _ in rows], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in rows], device=self.device)
        plain = GenerationConfig(
            do_sample=False, max_new_tokens=steps, min_new_tokens=steps, pad_token_id=PAD
        )
        self.model.generation_config = plain  # in place of the checkpoint's, whose values would fill the gaps
        made = self.model.generate(input_ids=tokens, attention_mask=mask)
        made[:, -1].tolist()  # wait for the device

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        del self.model
