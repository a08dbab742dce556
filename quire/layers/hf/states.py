"""Transformers' modules that keep a state of each sequence, over our rows of states (attention/states.py).

They find it in a cache that they are given, and leave it there, or elsewhere (ways.py). A step's batch is one row of
positions of many sequences, so here such a module is called for each of them with a cache of its own, and once for all
that compute their newest token.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from quire.attention.base import Ragged
from quire.attention.states import State
from quire.errors import UnsupportedModel
from quire.layers.hf.ways import WAYS
from quire.models.spec import Kept

WRITES = {"update_conv_state", "update_recurrent_state", "set_linear_cache"}
CACHES = ("cache_params", "past_key_values")
# Where these are called, or in these classes, several positions begin at zeros whatever the state is.
FORGETFUL = {"mamba_selective_scan", "RecurrentGemmaRecurrentBlock"}


class StateCache:
    """What a module takes for Transformers' cache: its own state of the B sequences of a call, and no other layer's.

    Attributes:
        parts: [B, ...] by kind and number; none at the beginning of a sequence.
    """

    record_past = False

    def __init__(self, parts: Mapping[tuple[str, int], Tensor]):
        self.parts = dict(parts)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.parts.get(("conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.parts.get(("recurrent", state_idx))

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        return self.get_recurrent_state(layer_idx)

    def update_conv_state(
        self, x: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None
    ) -> Tensor:
        """x [B, channels, n] of new positions -> with those before them that a convolution sees."""
        before = self.get_conv_state(layer_idx, state_idx)
        width = (conv_kernel_size or x.shape[-1]) if before is None else before.shape[-1]
        found = pad(x, (max(width - x.shape[-1], 0), 0)) if before is None else torch.cat([before, x], -1)
        self.parts["conv", state_idx] = found[..., -width:]
        return found

    def update_recurrent_state(self, x: Tensor, layer_idx: int, state_idx: int = 0) -> Tensor:
        self.parts["recurrent", state_idx] = x
        return x

    def set_linear_cache(self, layer_idx: int, x: Tensor) -> None:
        self.update_recurrent_state(x, layer_idx)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int = 0) -> bool:
        return bool(self.parts)

    def is_recording_past(self, layer_idx: int) -> bool:
        return self.record_past

    # Before 5.23 modules look into the layer's own cache.

    @property
    def layers(self) -> "Everywhere":
        return Everywhere(self)

    @property
    def conv_states(self) -> dict[int, Tensor]:
        return {number: part for (kind, number), part in self.parts.items() if kind == "conv"}

    @property
    def recurrent_states(self) -> dict[int, Tensor]:
        return {number: part for (kind, number), part in self.parts.items() if kind == "recurrent"}


@dataclass(frozen=True, slots=True)
class Everywhere:
    """One cache as that of each layer."""

    cache: StateCache

    def __getitem__(self, layer_idx: int) -> StateCache:
        return self.cache


@dataclass(frozen=True, slots=True)
class Piece:
    """Sequences that a module is called for at once: their positions in the batch, and whose state is whose."""

    tokens: Tensor  # [B, n] int64
    rows: Tensor  # [B] int64
    begins: bool  # at the sequences' first positions


def pieces(step: Ragged) -> list[Piece]:
    """Sequences one by one, and at last those together that compute their newest token. Waits for the device."""
    ends, lengths = step.query_starts.tolist(), step.lengths.tolist()
    device, found, newest = step.rows.device, [], []
    for i, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
        begins = lengths[i] == end - start
        if end - start == 1 and not begins:
            newest.append(i)
        elif end > start:
            tokens = torch.arange(start, end, device=device)
            found.append(Piece(tokens[None], step.rows[i : i + 1], begins))
    if newest:
        which = torch.tensor(newest, device=device)
        found.append(Piece(step.query_starts[which].long()[:, None], step.rows[which], False))
    return found


class Computes(Protocol):
    """Who runs the network."""

    def compute(self, module: "Stateful", inputs: Mapping[str, Any]) -> Any:
        """What the module returns for inputs [1, T, ...] by name."""


_computing: ContextVar[Computes] = ContextVar("computing")


@contextmanager
def computing(who: Computes) -> Iterator[None]:
    """Calls of modules that keep states go to `who` inside."""
    token = _computing.set(who)
    try:
        yield
    finally:
        _computing.reset(token)


class Stateful:
    """The forward pass of a module that keeps states, by its name in the model."""

    def __init__(self, name: str, module: nn.Module):
        self.name, self.module, self.forward = name, module, module.forward
        self.parameters = [*inspect.signature(module.forward).parameters]
        self.way = WAYS.get(type(module).__name__)
        self.cache_name = next((name for name in CACHES if name in self.parameters), "")
        self.forgetful = not FORGETFUL.isdisjoint(_names(module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _computing.get().compute(self, dict(zip(self.parameters, args, strict=False)) | kwargs)

    def call(self, inputs: Mapping[str, Any], cache: StateCache) -> Any:
        """The module's own, which reads and writes `cache`."""
        if self.way is not None:
            return self.way(self.module, self.forward, inputs, cache.parts)
        return self.forward(**{**inputs, self.cache_name: cache})


def _names(module: nn.Module) -> set[str]:
    """A module's class, and what its forward pass calls."""
    code = inspect.unwrap(type(module).forward).__code__
    return {type(module).__name__, *code.co_names, *code.co_freevars}


def wrap(model: nn.Module) -> list[str]:
    """Have calls of a model's modules that keep states go to who is `computing`; their names."""
    keepers = WRITES | WAYS.keys()
    found = [
        (name, module) for name, module in model.named_modules() if not keepers.isdisjoint(_names(module))
    ]
    for name, module in found:
        vars(module)["forward"] = Stateful(name, module)
    return [name for name, _ in found]


@dataclass(slots=True)
class Over:
    """One step over the modules' states, by their names."""

    states: Mapping[str, tuple[tuple[Kept, ...], State]]
    pieces: Sequence[Piece]

    def compute(self, module: Stateful, inputs: Mapping[str, Any]) -> Any:
        """See Computes."""
        kept, state = self.states[module.name]
        keys = [(part.kind, part.number) for part in kept]
        length = sum(piece.tokens.numel() for piece in self.pieces)
        found = []
        for piece in self.pieces:
            cache = StateCache({})
            if not piece.begins:
                cache.parts |= {key: rows[piece.rows] for key, rows in zip(keys, state, strict=True)}
            at_once = 1 if module.forgetful and not piece.begins else piece.tokens.shape[1]
            for tokens in piece.tokens.split(at_once, 1):
                here = {name: _pick(value, tokens, length) for name, value in inputs.items()}
                found.append((tokens, module.call(here, cache)))
            for key, rows in zip(keys, state, strict=True):
                rows[piece.rows] = cache.parts[key].to(rows.dtype)
        return _join([tokens for tokens, _ in found], [out for _, out in found], length)


def _pick(value: Any, tokens: Tensor, length: int) -> Any:
    """Of an input [1, length, ...] what belongs to `tokens` [B, n]; others as they are."""
    if isinstance(value, tuple):
        return tuple(_pick(one, tokens, length) for one in value)
    return value[0, tokens] if isinstance(value, Tensor) and value.shape[:2] == (1, length) else value


def _join(tokens: Sequence[Tensor], parts: Sequence[Any], length: int) -> Any:
    """Outputs [1, length, ...] of parts [B, n, ...], or tuples of such; None of what is no position's."""
    if isinstance(parts[0], tuple):
        return tuple(_join(tokens, column, length) for column in zip(*parts, strict=True))
    if not all(isinstance(y, Tensor) and y.shape[:2] == t.shape for t, y in zip(tokens, parts, strict=True)):
        return None
    whole = parts[0].new_empty(1, length, *parts[0].shape[2:])
    for t, y in zip(tokens, parts, strict=True):
        whole[0, t] = y
    return whole


@dataclass(slots=True)
class Parts:
    """Keeps nothing and remembers what rows would have to hold, of a network that is not float32."""

    found: dict[str, tuple[Kept, ...]] = field(default_factory=dict)

    def compute(self, module: Stateful, inputs: Mapping[str, Any]) -> Any:
        """See Computes."""
        if module.name in self.found:
            raise UnsupportedModel(f"{module.name} keeps a state and is computed twice in a pass")
        cache = StateCache({})
        out = module.call(inputs, cache)
        self.found[module.name] = tuple(
            Kept(kind=kind, number=number, shape=tuple(part.shape[1:]), exact=part.dtype == torch.float32)
            for (kind, number), part in cache.parts.items()
        )
        return out
