"""What the stages of a network (models/stages.py) hand on, each to the next one's rank of the same place."""

from typing import NamedTuple

import torch
from torch import Tensor

from quire.layers.base import Build
from quire.models import spec
from quire.models.stages import Stage
from quire.parallel.axis import Axis


class Begun(NamedTuple):
    """A step's T tokens before a layer."""

    x: Tensor  # [T, dim], or all streams of it [num, T, dim]
    embedded: Tensor  # [T, dim], which some layers read beside the residual
    own: (
        tuple[Tensor, ...] | None
    )  # [T, size] of each layer to come, where layers have embeddings of their own


class Relay:
    """One tensor [T, width] a step, in the network's dtype: | streams | embedding, if read | own of later layers |."""

    def __init__(self, s: spec.Decoder, stage: Stage, axis: Axis, build: Build):
        self.stage, self.axis, self.build = stage, axis, build
        altup = s.blocks[0].altup
        self.num_streams = altup.num if altup else None
        self.reads_embedding = any(isinstance(block.mixer, spec.Guided) for block in s.blocks)
        self.sizes = [block.embedding.dim for block in s.blocks if block.embedding]

    def send(self, x: Tensor, begun: Begun) -> Tensor:
        """Hand on x, and of what this stage `begun` with what later ones read, too; returns all of it."""
        parts = [x] if self.num_streams is None else list(x)
        if self.reads_embedding:
            parts.append(begun.embedded)
        if begun.own is not None:
            parts += begun.own[self.stage.end - self.stage.first :]
        handed = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        self.axis.send(handed, self.axis.rank + 1)
        return handed

    def receive(self, num_tokens: int) -> Begun:
        """What the stage before has handed on."""
        dim, device, dtype = self.build.dim, self.build.device, self.build.dtype
        streams = self.num_streams or 1
        sizes = [*[dim] * (streams + self.reads_embedding), *self.sizes[self.stage.first :]]
        taken = torch.empty(num_tokens, sum(sizes), dtype=dtype, device=device)
        parts = self.axis.receive(taken, self.axis.rank - 1).split(sizes, -1)
        x = parts[0].contiguous() if self.num_streams is None else torch.stack(parts[:streams])
        own = tuple(part.contiguous() for part in parts[len(parts) - len(self.sizes[self.stage.first :]) :])
        return Begun(x, parts[streams].contiguous() if self.reads_embedding else x, own or None)
