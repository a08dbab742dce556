"""Transformers' classes: which one a config.json asks for, and its modules without weights. Runs no code of models."""

import copy
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from quire.errors import ModelError, QuireError, UnsupportedModel
from quire.layers.hf import attention, experts
from quire.layers.hf.alone import EAGER, kept_heads
from quire.layers.hf.attention import Shapes, running
from quire.layers.hf.latent import keep_latents
from quire.layers.hf.plan import Imagined, Plan
from quire.layers.hf.states import Parts, computing, wrap
from quire.models.foreign import generating
from quire.models.hf import HF
from quire.models.mamba import LONGEST
from quire.models.spans import Spans, spans_of
from quire.models.spec import Foreign, Heads

LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
    "seq_length",
    "n_ctx",
    "model_max_length",
)
TRAINED = {"bloom": 2048}  # positions that scores by the distance have learned, which no config states
BODIES = ("model", "transformer", "backbone")  # where a class's own word for it is wrong


def hf_config(raw: Mapping[str, Any], max_length: int | None = None) -> Any:
    """Transformers' form of a config.json, which names a class that generates text, for positions below `max_length`.

    Raises:
        UnsupportedModel: it knows no such class.
        ModelError: the class refuses the values.
    """
    from transformers import CONFIG_MAPPING

    architecture, kind = raw["architectures"][0], raw.get("model_type")
    if kind not in CONFIG_MAPPING:  # a name of its authors' own, kimi_k2 for one: what the class is for
        kind = generating().get(architecture)
    if kind not in CONFIG_MAPPING:
        raise UnsupportedModel(f"{architecture}: this version of Transformers knows no model_type {kind!r}")
    try:
        config = CONFIG_MAPPING[kind].from_dict(copy.deepcopy(dict(raw)))
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


def interfaces(alone: bool) -> dict[str, str]:
    """Whose attention and experts modules use."""
    return {
        "attn_implementation": EAGER if alone else attention.NAME,
        "experts_implementation": experts.NAME,
    }


def empty(architecture: str, config: Any, alone: bool) -> Any:
    """The network on the device `meta`, with our attention, unless sequences are computed alone, and experts."""
    register()
    config = copy.deepcopy(config)
    config._attn_implementation, config._experts_implementation = interfaces(alone).values()
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


def describe(architecture: str, config: Any, alone: bool | None = None, num_ranks: int = 1) -> Foreign:
    """What others must know of a network, found by a pass on the device `meta`.

    Args:
        alone: whether sequences are computed one at a time; None: only if there is no other way.
        num_ranks: of which one's part is described.

    Raises:
        UnsupportedModel: it cannot be computed this way.
        ConfigError: not by so many ranks.
    """
    if alone is None:
        try:
            return describe(architecture, config, alone=False, num_ranks=num_ranks)
        except UnsupportedModel:
            return describe(architecture, config, alone=True, num_ranks=num_ranks)
    states, plan = Parts(), None
    try:
        model = empty(architecture, config, alone)
        plan = _cut(model, num_ranks)
        if not alone and wrap(model):
            model.to(torch.bfloat16)  # which shows what is float32 all the same
        parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}  # tied ones once
        head = next((n for n, module in model.named_modules() if module is model.get_output_embeddings()), "")
        products = {*_products(model)}
        reads = Reads(_hollow(model))
        if plan is not None:
            plan.connect(model, Imagined(num_ranks))
        # With inference_mode, it would see less.
        with torch.no_grad(), reads, Numberless(), computing(states):
            heads = _heads(model, alone)
    except QuireError:
        raise
    except Exception as error:  # whatever a module does with a batch that it does not expect
        if plan is not None:
            raise plan.refusal(f"a part of it does not run: {type(error).__name__}: {error}") from error
        raise UnsupportedModel(
            f"{architecture}: its modules do not run with another's"
            f" {'cache' if alone else 'attention'}: {type(error).__name__}: {error}"
        ) from error
    if not heads and not states.found:
        raise UnsupportedModel(
            f"{architecture}: no layer calls Transformers' attention interface or keeps a state in its cache"
        )
    return Foreign(
        architecture=architecture,
        vocab_size=config.vocab_size,
        dim=model.get_input_embeddings().weight.shape[1],
        max_length=_max_length(architecture, config, bool(states.found)) - first_position(model),
        attention=heads,
        parameters=tuple(parameters.items()),
        products=frozenset(parameters.keys() & products - reads.found),
        head=f"{head}.weight",
        states=tuple(states.found.items()),
        alone=alone,
        spans=_spans(architecture, config, alone),
    )


def _spans(architecture: str, config: Any, alone: bool) -> Spans | None:
    found = spans_of(HF({**config.to_dict(), "architectures": [architecture]}))
    if found is not None and alone:
        raise UnsupportedModel(
            f"{architecture}: positions of prompts see later ones, which its modules would mask"
        )
    return found


def _cut(model: Any, num_ranks: int) -> Plan | None:
    """Leave the first rank's part of a network without weights, by the plan that is returned."""
    if num_ranks == 1:
        return None
    plan = Plan(model, num_ranks, 0)
    plan.cut(model)
    return plan


class Hollow(nn.Module):
    """Has the weight of a linear layer and multiplies nothing."""

    def __init__(self, linear: Any):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.width = linear.weight.shape[0 if type(linear) is nn.Linear else 1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_empty(*x.shape[:-1], self.width)


def _hollow(model: Any) -> dict[int, str]:
    """Replaces linear layers; the names of their weights by identity."""
    found = {}
    for name, module in [*model.named_modules()]:
        if is_linear(module):
            model.set_submodule(name, Hollow(module))
            found[id(module.weight)] = f"{name}.weight"
    return found


class Reads(TorchFunctionMode):
    """Notices weights that others than their layers compute with: these layers have to stay."""

    def __init__(self, names: Mapping[int, str]):
        super().__init__()
        self.names, self.found = names, set[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ != "__get__":  # to ask for its type is no use of it
            flat = [one for arg in args for one in (arg if isinstance(arg, list | tuple) else [arg])]
            self.found |= {self.names[id(one)] for one in flat if id(one) in self.names}
        return func(*args, **(kwargs or {}))


class Numberless(TorchDispatchMode):
    """Has modules go on where they ask for numbers that there are none of: 0, and nothing is chosen."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, kwargs = torch.ops.aten, kwargs or {}
        if not (args and isinstance(args[0], torch.Tensor) and args[0].is_meta):
            return func(*args, **kwargs)
        if func is aten.nonzero.default:
            return args[0].new_empty(0, args[0].ndim, dtype=torch.int64)
        if func is aten._local_scalar_dense.default:
            return 0
        if func is aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is aten.split_with_sizes.default and sum(args[1]) != args[0].shape[(*args, 0)[2]]:
            args = (args[0], [args[0].shape[(*args, 0)[2]], *args[1][1:]], *args[2:])
        if func is aten.index.Tensor:
            args = (args[0], [part for index in args[1] for part in _places(index)])
        return func(*args, **kwargs)


def _places(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """A mask's as numbers, of which there are none."""
    if index is None or index.dtype is not torch.bool:
        return [index]
    return [index.new_empty(0, dtype=torch.int64)] * index.ndim


def _heads(model: Any, alone: bool) -> tuple[Heads, ...]:
    """What the layers of a network on the device `meta` cache."""
    body, tokens = model.get_submodule(body_name(model)), torch.zeros(1, 2, dtype=torch.int64, device="meta")
    if alone:
        return kept_heads(body, tokens, model.config.num_attention_heads)
    keep_latents(model, pack=lambda weight: weight)
    shapes = Shapes()
    with running(shapes):
        body(input_ids=tokens, position_ids=tokens, use_cache=False)
    return tuple(shapes.heads)


def first_position(model: Any) -> int:
    """The number of a sequence's first position: RoBERTa and its like count from after the padding's id on."""
    counting = (m for m in model.modules() if "create_position_ids_from_input_ids" in dir(type(m)))
    return next((m.padding_idx + 1 for m in counting if m.padding_idx is not None), 0)


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


def _max_length(architecture: str, config: Any, keeps_states: bool) -> int:
    if length := _stated_length(config):
        return length
    if config.model_type in TRAINED:
        return TRAINED[config.model_type]
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
