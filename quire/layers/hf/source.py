"""Transformers' classes: which one a config.json asks for, and its modules without weights. Runs no code of models."""

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from quire.errors import ModelError, UnsupportedModel
from quire.layers.hf import attention, experts
from quire.layers.hf.attention import Shapes, running
from quire.layers.hf.states import Parts, computing, wrap
from quire.models.mamba import LONGEST
from quire.models.spec import Foreign

LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
    "n_ctx",
    "model_max_length",
)
INTERFACES = {"attn_implementation": attention.NAME, "experts_implementation": experts.NAME}
BODIES = ("model", "transformer", "backbone")  # where a class's own word for it is wrong


def hf_config(raw: Mapping[str, Any], max_length: int | None = None) -> Any:
    """Transformers' form of a config.json, which names a class that generates text, for positions below `max_length`.

    Raises:
        UnsupportedModel: it knows no such class.
        ModelError: the class refuses the values.
    """
    from transformers import CONFIG_MAPPING

    architecture, kind = raw["architectures"][0], raw.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise UnsupportedModel(f"{architecture}: this version of Transformers knows no model_type {kind!r}")
    try:
        config = CONFIG_MAPPING[kind].from_dict({**raw})
    except Exception as error:
        raise ModelError(f"config.json: Transformers refuses it: {error}") from error
    if "vocab_size" not in config.to_dict():
        raise UnsupportedModel(f"{architecture} is made of several networks, which is not supported yet")
    _fix_rope(vars(config).get("rope_parameters"), max_length or _stated_length(config), architecture)
    return config


def hf_class(architecture: str) -> Any:
    """The class of a network that generates text, by its name."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise UnsupportedModel(
            f"Transformers {transformers.__version__} has no {architecture} that generates text from text"
        )
    return vars(transformers).get(architecture) or transformers.__getattr__(architecture)


def register() -> None:
    """Make our attention and experts known to Transformers, and have it print only errors."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    attention.register()
    experts.register()


def empty(architecture: str, config: Any) -> Any:
    """The network on the device `meta`, with our attention and experts."""
    register()
    config = copy.deepcopy(config)
    config._attn_implementation, config._experts_implementation = INTERFACES.values()
    with torch.device("meta"):
        return calm(hf_class(architecture)(config))


def calm(model: Any) -> Any:
    """Ready to compute: nothing is random, and no batch is searched for padding, which would wait for the device."""
    vars(model.config)["pad_token_id"] = None  # past the checks of those that must have one
    if "max_inference_chunksize" in vars(model.config):  # xLSTM's, whose pieces have a cache of its own
        model.config.max_inference_chunksize = sys.maxsize
    model.eval().requires_grad_(False)
    for module in model.modules():
        if "layers_are_rescaled" in vars(module):  # RWKV's weights, at its first pass otherwise
            module._rescale_layers()
    return model


def body_name(model: Any) -> str:
    """The part before the head, by its name in the model."""
    children = dict(model.named_children())
    return next(name for name in (model.base_model_prefix, *BODIES) if name in children)


def describe(architecture: str, config: Any) -> Foreign:
    """What others must know of a network, found by a pass on the device `meta`.

    Raises:
        UnsupportedModel: its layers do not take Transformers' attention interface.
    """
    shapes, states = Shapes(), Parts()
    tokens = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    try:
        model = empty(architecture, config)
        if stateful := wrap(model):
            model.to(torch.bfloat16)  # which shows what is float32 all the same
        read = _unused(model, stateful)
        with running(shapes), computing(states), torch.inference_mode():
            model.get_submodule(body_name(model))(input_ids=tokens, position_ids=tokens, use_cache=False)
    except UnsupportedModel:
        raise
    except Exception as error:  # whatever a module does with a batch that it does not expect
        raise UnsupportedModel(
            f"{architecture}: its modules do not run with another's attention: {type(error).__name__}: {error}"
        ) from error
    if not shapes.heads and not states.found:
        raise UnsupportedModel(
            f"{architecture}: no layer calls Transformers' attention interface or keeps a state in its cache"
        )
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}  # tied ones once
    head = next((n for n, module in model.named_modules() if module is model.get_output_embeddings()), "")
    return Foreign(
        architecture=architecture,
        vocab_size=config.vocab_size,
        dim=model.get_input_embeddings().weight.shape[1],
        max_length=_max_length(architecture, config, bool(states.found)),
        attention=tuple(shapes.heads),
        parameters=tuple(parameters.items()),
        products=frozenset(parameters.keys() & {*_products(model)} - read),
        head=f"{head}.weight",
        states=tuple(states.found.items()),
    )


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by a weight, [outputs, inputs] or, in GPT-2 and its like, the other way around."""
    from transformers.pytorch_utils import Conv1D

    return type(module) in (nn.Linear, Conv1D)


def _products(model: Any) -> Iterator[str]:
    """Weights of linear layers, and of experts."""
    for name, module in model.named_modules():
        if is_linear(module):
            yield f"{name}.weight"
        elif experts.is_experts(module):
            yield from (f"{name}.{weight}" for weight in experts.WEIGHTS)


def _unused(model: Any, names: Sequence[str]) -> set[str]:
    """Weights of linear layers inside these modules, until one is called: modules may read them as they are."""
    found = set()
    for name, module in model.named_modules():
        if is_linear(module) and any(name.startswith(f"{outer}.") for outer in names):
            found.add(weight := f"{name}.weight")
            module.register_forward_pre_hook(lambda *_, weight=weight: found.discard(weight))
    return found


def _max_length(architecture: str, config: Any, keeps_states: bool) -> int:
    if length := _stated_length(config):
        return length
    if keeps_states:
        return LONGEST
    raise ModelError(
        f"config.json of {architecture} does not say how many positions it was made for; add"
        " max_position_embeddings, with --hf-overrides for example"
    )


def _stated_length(config: Any) -> int:
    """0 if there is none."""
    values = config.to_dict()
    found = (values.get(name) for name in LENGTHS)
    return next((length for length in found if isinstance(length, int) and length > 0), 0)


def _fix_rope(rope: Any, max_length: int, architecture: str) -> None:
    """Keep rotations from depending on the longest sequence in a batch: longrope by `max_length`, as natively."""
    if not isinstance(rope, dict):
        return
    if rope.get("rope_type") == "dynamic":
        raise UnsupportedModel(
            f"{architecture}: rope_type 'dynamic' turns positions by the longest sequence of a batch in Transformers,"
            " so that results would depend on other requests"
        )
    if rope.get("rope_type") == "longrope":
        long = max_length > rope.get("original_max_position_embeddings", max_length)
        rope["short_factor"] = rope["long_factor"] = rope["long_factor" if long else "short_factor"]
    for inner in rope.values():
        _fix_rope(inner, max_length, architecture)
