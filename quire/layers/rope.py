"""Cosines and sines of rotary position embeddings, for every kind of scaling that specs carry; growth of queries."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quire.errors import UnsupportedModel
from quire.models.spec import Growth, Rope

Scaled = tuple[Tensor, float]  # inverse frequencies [dim / 2], and what cosines and sines are multiplied by


def _linear(inverse: Tensor, options: Mapping[str, Any]) -> Scaled:
    """Chen et al. 2023: positions divided by a factor."""
    return inverse / options["factor"], 1.0


def _llama3(inverse: Tensor, options: Mapping[str, Any]) -> Scaled:
    """Llama 3.1: low frequencies divided by a factor, high ones kept, a linear mix between."""
    low, high = options["low_freq_factor"], options["high_freq_factor"]
    turns = options["original_max_position_embeddings"] * inverse / (2 * math.pi)
    mix = ((turns - low) / (high - low)).clamp(0, 1)
    return inverse / options["factor"] * (1 - mix) + inverse * mix, 1.0


def _yarn(inverse: Tensor, options: Mapping[str, Any], rope: Rope) -> Scaled:
    """YaRN (Peng et al. 2023): as llama3, with a ramp over dimensions, and warmer attention."""
    original, factor = options["original_max_position_embeddings"], options["factor"]

    def dim_of(turns: float) -> float:
        return rope.dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(options["beta_fast"]), dim_of(options["beta_slow"])
    if options["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = ((torch.arange(rope.dim // 2).float() - low) / max(high - low, 1e-3)).clamp(0, 1)
    return inverse / factor * ramp + inverse * (1 - ramp), options["attention_factor"]


def _longrope(inverse: Tensor, options: Mapping[str, Any], num_positions: int) -> Scaled:
    """LongRoPE (Ding et al. 2024): a factor per dimension.

    Which factors is decided by the longest sequence that may come, not by each sequence, so that cached keys
    stay valid while a sequence grows.
    """
    long = num_positions > options["original_max_position_embeddings"]
    factors = torch.tensor(options["long_factor" if long else "short_factor"], dtype=torch.float32)
    return inverse / factors, options["attention_factor"]


def _proportional(inverse: Tensor, options: Mapping[str, Any]) -> Scaled:
    """LFM3 and Gemma 4: the highest frequencies of a whole head, and none for the rest of its pairs."""
    angles = int(options["partial_rotary_factor"] * len(inverse))
    return torch.where(torch.arange(len(inverse)) < angles, inverse, 0.0), 1.0


def frequencies(rope: Rope, num_positions: int) -> Scaled:
    """Inverse frequencies [rope.dim / 2] float32 and the gain, for sequences of at most `num_positions`.

    Raises:
        UnsupportedModel: the scaling is of an unknown kind.
    """
    inverse = 1.0 / rope.theta ** (torch.arange(0, rope.dim, 2).float() / rope.dim)
    options: Mapping[str, Any] = rope.scaling or {}
    match options.get("rope_type", "default"):
        case "default":
            return inverse, 1.0
        case "linear":
            return _linear(inverse, options)
        case "llama3":
            return _llama3(inverse, options)
        case "yarn":
            return _yarn(inverse, options, rope)
        case "proportional":
            return _proportional(inverse, options)
        case "longrope":
            return _longrope(inverse, options, num_positions)
        case other:
            known = "default, linear, llama3, longrope, proportional and yarn"
            raise UnsupportedModel(f"rope_type {other!r} is not known; {known} are")


def grown(q: Tensor, growth: Growth | None, positions: Tensor) -> Tensor:
    """Queries [T, H, D] as spec.Growth has them; positions [T]."""
    if growth is None:
        return q
    factors = 1 + growth.rate * ((positions + growth.first) // growth.length).float().log1p()
    return (q * factors[:, None, None]).to(q.dtype)


class RopeTables:
    """The cosines and sines of a network's ropes, each computed once and shared by its layers."""

    def __init__(self, num_positions: int, device: torch.device):
        self.num_positions, self.device = num_positions, device
        self._tables: dict[str, tuple[Tensor, Tensor]] = {}
        self._coordinates: Tensor | None = None  # of the step whose rows are at hand
        self._rows: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # by the address of a table's cosines
        self._axes: dict[int, Tensor] = {}  # [R] int64, likewise

    def table(self, rope: Rope) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [num_positions, rope.dim / 2] float32."""
        key = repr(replace(rope, interleaved=False))  # which pairs turn is not in it
        if key not in self._tables:
            inverse, gain = frequencies(rope, self.num_positions)
            angles = torch.arange(self.num_positions).float()[:, None] * inverse
            cos, sin = angles.cos() * gain, angles.sin() * gain
            self._tables[key] = cos, sin = cos.to(self.device), sin.to(self.device)
            self._axes[cos.data_ptr()] = torch.tensor(rope.axes or [0] * len(inverse), device=self.device)
        return self._tables[key]

    def rows(self, table: tuple[Tensor, Tensor], coordinates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cosines and sines, each [any, R] float32, and which of their rows are those of `coordinates` [T].

        Of coordinates [3, T] each pair has those of its axis, which are gathered once for all layers of a step.
        """
        cos, sin = table
        if coordinates.dim() == 1:
            return cos, sin, coordinates
        if self._coordinates is not coordinates:
            self._coordinates, self._rows = coordinates, {}
        if (key := cos.data_ptr()) not in self._rows:
            at = coordinates[self._axes[key]].T.contiguous()  # [T, R], as what is gathered lies
            pairs = torch.arange(cos.shape[1], device=self.device)
            self._rows[key] = cos[at, pairs], sin[at, pairs], torch.arange(len(at), device=self.device)
        return self._rows[key]
