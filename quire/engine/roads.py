"""The two roads from a config.json to a network: layers of ours, and Transformers' modules over our cache."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from quire.attention.base import Backend
from quire.checkpoint.dummy import DummyCheckpoint
from quire.checkpoint.reader import Checkpoint, stored_tensors
from quire.config import Config
from quire.errors import CheckpointError, ConfigError, UnsupportedModel
from quire.layers.base import Network
from quire.layers.decoder import Decoder
from quire.log import logger
from quire.models import registry, spec
from quire.models.composite import COMPOSITES
from quire.models.names import SHARED_HEAD, Names
from quire.models.parameters import parameter_shapes
from quire.models.spec import Spec
from quire.models.stages import stage_shapes
from quire.parallel.axis import Axes
from quire.resolve import BITS, whole_experts

ROWS_COMPARED = 4096  # at a time


class Road(Protocol):
    """One of them, with the network that was found at its beginning."""

    @property
    def spec(self) -> Spec: ...

    def network(self, config: Config, backend: Backend, device: torch.device, axes: Axes) -> Network:
        """Without weights; `config` is resolved. What this rank computes of it."""

    def load(self, network: Any, config: Config, folder: Path) -> None:
        """Fill in the weights. Raises CheckpointError if they are not this network's."""


class Native:
    """A family's spec, computed by layers of ours."""

    def __init__(self, raw: Mapping[str, Any]):
        self.spec, self.names = registry.decoder_spec(raw)
        if (architecture := raw["architectures"][0]) in COMPOSITES:
            logger.info(
                "%s is made of several networks, and only its text is served: parts of messages that are no text are"
                " refused",
                architecture,
            )

    def network(self, config: Config, backend: Backend, device: torch.device, axes: Axes) -> Decoder:
        experts = whole_experts(config, self.spec)
        return Decoder(self.spec, axes=axes, experts=experts, **_how(config, backend, device))

    def load(self, network: Decoder, config: Config, folder: Path) -> None:
        if config.load_format == "dummy":
            network.load(_dummy(network, config))
            return
        checkpoint = Checkpoint(folder, self.names)
        whole, own = dict(parameter_shapes(network.spec)), dict(stage_shapes(network.spec, network.stage))
        checkpoint.check(whole.items())  # before the first byte of weights is read
        if network.spec.tied and network.axes.world.rank == 0:
            _check_head(folder, self.names, network.spec)
        network.load(checkpoint)
        if network.build.spreading is None:  # other ranks read the rest of the experts
            checkpoint.finish(elsewhere=whole.keys() - own.keys())


class Foreign:
    """Transformers' modules, if a small network of the kind computes over our cache what it computes there."""

    def __init__(self, raw: Mapping[str, Any], config: Config):
        from quire.layers.hf import conformance, source  # which load Transformers

        architecture, alone = raw["architectures"][0], None
        if config.skip_conformance:
            logger.warning(
                "%s runs through Transformers' modules, and skip_conformance is set: nobody has checked that its"
                " answers are right over the paged cache",
                architecture,
            )
        else:
            found = conformance.check(raw)
            alone = found.alone
            logger.info(
                "%s runs through Transformers' modules%s; a small one differs from Transformers by %.1g of the greatest"
                " logit",
                architecture,
                ", one sequence at a time, since they attend themselves" if alone else "",
                found.difference,
            )
        if alone and config.tensor_parallel_size > 1:
            raise ConfigError(
                f"tensor_parallel_size is {config.tensor_parallel_size}, and Transformers' modules of {architecture}"
                " attend themselves, which only one process can have them do; leave it out"
            )
        self.hf_config = source.hf_config(raw, config.max_model_len)
        self.spec = source.describe(architecture, self.hf_config, alone, config.tensor_parallel_size)

    def network(self, config: Config, backend: Backend, device: torch.device, axes: Axes) -> Any:
        from quire.layers.hf.network import Modules

        return Modules(self.spec, self.hf_config, axes=axes, **_how(config, backend, device))

    def load(self, network: Any, config: Config, folder: Path) -> None:
        if config.load_format == "dummy":
            network.load_dummy(_dummy(network, config))
        else:
            network.load(stored_tensors(folder))


def take_road(raw: Mapping[str, Any], config: Config) -> Road:
    """The one that the config and the option model_impl lead to.

    Raises:
        UnsupportedModel, ModelError: there is none, or not the wanted one.
        ConfigError: an option cannot be had on it.
    """
    if registry.road(raw, config.model_impl) == registry.NATIVE:
        return Native(raw)
    for axis, what in {
        "decode_context_parallel_size": "over caches in parts",
        "pipeline_parallel_size": "in stages",
    }.items():
        if (size := vars(config)[axis]) > 1:
            raise ConfigError(
                f"{axis} is {size}, and {what} Transformers' modules are not run; leave it out, or take a native"
                " architecture (`quire models`)"
            )
    if config.deterministic:
        raise ConfigError(
            "deterministic is set, and Transformers' modules add up in an order that depends on the batch; it needs a"
            " native architecture (`quire models`)"
        )
    try:
        return Foreign(raw, config)
    except UnsupportedModel as error:
        if not registry.is_native(raw["architectures"][0]):
            raise
        raise UnsupportedModel(f"{error}. It is native as well: leave out --model-impl") from error


def _check_head(folder: Path, names: Names, s: spec.Decoder) -> None:
    """
    Raises:
        CheckpointError: the head is the embedding, says config.json, and the checkpoint has another one.
    """
    both = Checkpoint(folder, replace(names, ignored=tuple(p for p in names.ignored if p != SHARED_HEAD)))
    head, table, shape = "lm_head.weight", "embed_tokens.weight", (s.vocab_size, s.dim)
    for start in range(0, s.vocab_size if head in both else 0, ROWS_COMPARED):
        rows = slice(start, min(start + ROWS_COMPARED, s.vocab_size))
        if not torch.equal(
            both.tensor(head, shape=shape, rows=rows), both.tensor(table, shape=shape, rows=rows)
        ):
            raise CheckpointError(
                f"{folder}: its head is not its embedding, and config.json says that it is; set tie_word_embeddings to"
                " false, with --hf-overrides for example"
            )


def _how(config: Config, backend: Backend, device: torch.device) -> dict[str, Any]:
    return {
        "backend": backend,
        "dtype": getattr(torch, config.dtype),
        "device": device,
        "max_length": config.max_model_len,
        "invariant": config.deterministic,
        "bits": BITS.get(config.quantization),
    }


def _dummy(network: Network, config: Config) -> DummyCheckpoint:
    return DummyCheckpoint(config.seed, network.build.dtype, network.build.device)
