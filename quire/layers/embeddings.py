"""Embeddings that tokens have for each layer, beside the one that enters the first (Gemma 3n and 4)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quire.kernels import ops
from quire.layers.base import Build, Weights
from quire.layers.linear import EXACT, Linear
from quire.layers.norm import Norm
from quire.models import spec


class LayerEmbeddings(nn.Module):
    """All layers' embeddings of a step's tokens, computed before the first layer."""

    def __init__(self, parts: Sequence[spec.LayerEmbedding], rows: int, build: Build):
        """`rows`: of the table; see spec.Decoder."""
        super().__init__()
        self.rows, self.build, self.size, self.num_layers = rows, build, parts[0].dim, len(parts)
        # A product that is divided by sqrt(dim) before its norm, or of a norm whose eps is as much larger.
        normalised = replace(parts[0].norm, eps=parts[0].norm.eps * build.dim)
        total = self.num_layers * self.size
        self.projection = Linear(build.dim, {"per_layer_model_projection": total}, build, least_bits=EXACT)
        self.norm = Norm(normalised, (self.size,), build)
        self.scale = torch.tensor(self.size**0.5, dtype=build.dtype).item()  # rounded as the first one's
        self.table: Any = None

    def load(self, weights: Weights) -> None:
        self.table = self.build.pull(
            weights, "embed_tokens_per_layer.weight", self.rows, self.num_layers * self.size
        )
        self.projection.load(weights, "")
        self.norm.load(weights, "per_layer_projection_norm")

    def forward(self, token_ids: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """token_ids [T], their embeddings x [T, dim] -> [T, size] of each layer."""
        own = ops.embed(torch.where(token_ids < self.rows, token_ids, 0), self.table, self.scale)
        projected = self.norm(self.projection(x).unflatten(-1, (self.num_layers, self.size)))
        return ((projected.flatten(1) + own) * math.sqrt(0.5)).split(self.size, -1)


class Gated(nn.Module):
    """What a layer makes of its embedding: projection(act(gate(x)) * e), and the norm of that for who adds it."""

    def __init__(self, s: spec.LayerEmbedding, build: Build):
        super().__init__()
        self.spec = s
        self.gate = Linear(build.dim, {"per_layer_input_gate": s.dim}, build)
        self.projection = Linear(s.dim, {"per_layer_projection": build.dim}, build)
        self.norm = Norm(s.norm, (build.dim,), build)

    def load(self, weights: Weights, name: str) -> None:
        self.gate.load(weights, name)
        self.projection.load(weights, name)
        self.norm.load(weights, f"{name}.post_per_layer_input_norm")

    def forward(self, x: Tensor, own: Tensor) -> Tensor:
        """x [T, dim], its tokens' embeddings for this layer [T, size] -> [T, dim], not yet normalised."""
        return self.projection(ops.act_mul(torch.cat((self.gate(x), own), -1), self.spec.act))
