"""Whether a network computes over our cache what it computes in Transformers: asked of a small one of its kind.

A module may lose what it leaves to a mask, mix sequences that share a batch, or keep something from step to step, and
none of that is an error anywhere. So the config is shrunk, its weights are drawn, and logits of sequences that come in
pieces, beside each other, in scattered blocks, are compared with those of Transformers, one sequence at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quire.attention.base import ragged
from quire.attention.reference import Reference
from quire.attention.shapes import block_bytes
from quire.attention.states import state_bytes
from quire.errors import ModelError, QuireError, UnsupportedModel
from quire.layers.hf.network import Modules
from quire.layers.hf.shrink import shrink
from quire.layers.hf.source import describe, empty, hf_class, hf_config
from quire.models.hf import HF
from quire.models.spans import spans_of

LENGTHS = (23, 5, 14)  # more than windows, which are 5
STEPS = ((7, 5, 0), (9, 0, 1), (5, 0, 12), (1, 0, 1), (1, 0, 0))  # new tokens of each sequence
FIRST = tuple(next(filter(None, counts)) for counts in zip(*STEPS, strict=True))  # what comes first of each
BLOCK = 4
TOLERANCE = 1e-4  # of the greatest logit
STD, NORM_MEAN = 0.15, 0.5
MOST_PARAMETERS = 20_000_000
FIRST_TOKEN = 3  # those below are special


@dataclass(frozen=True, slots=True)
class Agreement:
    """How a network computes what Transformers does."""

    alone: bool  # one sequence at a time
    difference: float  # the greatest between logits, in units of the greatest logit


@dataclass(frozen=True, slots=True)
class Trial:
    """A small network of a kind, and Transformers' logits [length, vocab_size] of each prompt [length]."""

    architecture: str
    config: Any
    weights: Mapping[str, Tensor]
    prompts: Sequence[Tensor]
    logits: Sequence[Tensor]

    @property
    def largest(self) -> float:
        return max(float(logits.abs().max()) for logits in self.logits)


def check(raw: Mapping[str, Any]) -> Agreement:
    """Sequences in one batch if that is right, else alone.

    Raises:
        UnsupportedModel, ModelError: logits differ too much, or there is no comparing; the message says what to do.
    """
    architecture, reasons = raw["architectures"][0], []
    try:
        trial = prepare(raw)
    except QuireError:
        raise
    except Exception as error:
        raise UnsupportedModel(
            f"{architecture}: a small network of this kind does not run in Transformers: {type(error).__name__}:"
            f" {error}. Use a native architecture (`quire models`), or --skip-conformance if the shrunk config is at"
            " fault"
        ) from error
    for alone in (False, True):
        try:
            found = difference(trial, alone)
        except QuireError as error:
            reasons.append(str(error).removeprefix(f"{architecture}: "))
            continue
        except Exception as error:  # whatever a module does over a cache that is not its own
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        if found <= TOLERANCE:
            return Agreement(alone, found)
        reasons.append(
            f"logits differ from Transformers' by {found:.2g} of the greatest ({TOLERANCE:g} is allowed)"
        )
    raise UnsupportedModel(
        f"{architecture}: of a small network of this kind over the paged cache, {reasons[0]}; and one sequence at a"
        f" time, {reasons[1]}. It needs a native family (`quire models`); --skip-conformance serves it all the same"
    )


def prepare(raw: Mapping[str, Any]) -> Trial:
    """What to compare with.

    Raises:
        UnsupportedModel, ModelError: the network is no decoder, or too large.
    """
    architecture = raw["architectures"][0]
    whole = hf_config(raw).to_dict()  # with the class's defaults, which are as large as what config.json says
    config = hf_config(shrink(whole | {"architectures": raw["architectures"]}))
    if (
        size := sum(p.numel() for p in empty(architecture, config, alone=True).parameters())
    ) > MOST_PARAMETERS:
        raise UnsupportedModel(
            f"{architecture}: its config cannot be shrunk to less than {size:,} parameters ({MOST_PARAMETERS:,} are"
            " compared at most), so nobody knows whether its answers would be right; --skip-conformance serves it all"
            " the same"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        oracle = random_network(architecture, config)
        prompts = [torch.randint(FIRST_TOKEN, config.vocab_size, (n,)) for n in LENGTHS]
    weights, spans = copied(oracle.state_dict()), spans_of(HF(raw))
    with torch.inference_mode():
        *logits, before = [
            oracle(input_ids=p[None], use_cache=False, **_seen(p, first if spans else 0)).logits[0].float()
            for p, first in zip((*prompts, prompts[0][:-1]), (*FIRST, FIRST[0]), strict=True)
        ]
    trial = Trial(architecture, config, weights, prompts, logits)
    if float((before - logits[0][:-1]).abs().max()) > TOLERANCE * trial.largest:
        raise ModelError(
            f"{architecture}: what it says of a token depends on those that follow, so config.json makes no decoder of"
            " it. If it was trained to generate, set is_decoder to true, with --hf-overrides for example"
        )
    return trial


def _seen(prompt: Tensor, num_prefix: int) -> dict[str, Tensor]:
    """How Transformers is told that so many positions see each other."""
    return {"token_type_ids": (torch.arange(len(prompt)) < num_prefix).long()[None]} if num_prefix else {}


def difference(trial: Trial, alone: bool = False) -> float:
    """The greatest between logits, in units of the greatest logit; nan if any logit is none."""
    network = small_network(trial.architecture, trial.config, alone)
    network.load(copied(trial.weights))
    found = in_pieces(network, trial.prompts)
    gaps = [float((a - b).abs().max()) for a, b in zip(found, trial.logits, strict=True)]
    return (sum(gaps) if any(gap != gap for gap in gaps) else max(gaps)) / trial.largest


def copied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For a network that changes them in place."""
    return {name: tensor.clone() for name, tensor in weights.items()}


def small_network(architecture: str, config: Any, alone: bool = False) -> Modules:
    """Without weights, over blocks of a few tokens."""
    spec = describe(architecture, config, alone)
    return Modules(spec, config, backend=Reference(BLOCK), dtype=torch.float32)


def random_network(architecture: str, config: Any) -> Any:
    """Transformers' own, with random parameters and buffers: ones and zeros would hide what is left out.

    Buffers that begin as other numbers are computed from the config, and mean nothing if they are random.
    """
    config._attn_implementation = "eager"
    model = hf_class(architecture)(config).eval().float()
    with torch.no_grad():
        computed = {name for name, buffer in model.named_buffers() if buffer.unique().numel() > 1}
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and name not in computed:
                is_norm = name.endswith("weight") and tensor.ndim == 1
                tensor.normal_(mean=NORM_MEAN if is_norm else 0.0, std=STD)
    return model


def in_pieces(network: Modules, prompts: Sequence[Tensor]) -> list[Tensor]:
    """Logits [length, vocab_size] of each prompt."""
    needed = [-(-len(p) // BLOCK) for p in prompts]
    size = block_bytes(network.spec, BLOCK, network.build.dtype.itemsize)
    row = state_bytes(network.spec, network.build.dtype.itemsize)
    states = torch.full((len(prompts), row), 255, dtype=torch.uint8)  # no numbers, which nobody must read
    caches = network.caches(torch.zeros(sum(needed), size, dtype=torch.uint8), states)
    blocks = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(0)).tolist()
    tables = [[blocks.pop() for _ in range(count)] for count in needed]
    done, parts = [0] * len(prompts), [list[Tensor]() for _ in prompts]
    for counts in STEPS:
        now = [i for i, count in enumerate(counts) if count]
        spans = [((0, FIRST[i]),) for i in now] if network.spec.spans else None
        step = ragged(
            [done[i] for i in now], [counts[i] for i in now], [tables[i] for i in now], BLOCK, spans=spans
        )
        step = replace(step, rows=torch.tensor(now))
        tokens = torch.cat([prompts[i][done[i] : done[i] + counts[i]] for i in now])
        rows = network.logits(network(tokens, step, caches)).split([counts[i] for i in now])
        for i, some in zip(now, rows, strict=True):
            parts[i].append(some)
            done[i] += counts[i]
    return [torch.cat(some) for some in parts]
