"""Linear attention that forgets at a fixed rate (MiniMax-Text-01)."""

import torch
from torch import Tensor, nn

from quire.attention.base import Ragged
from quire.attention.states import State
from quire.kernels import ops
from quire.layers.base import Build, Weights
from quire.layers.linear import Linear
from quire.layers.norm import Norm, Normed
from quire.models import spec


class Lightning(nn.Module):
    """q, k, v and the gate in one product; activate; recur; norm, gate; output."""

    def __init__(self, s: spec.Lightning, build: Build):
        super().__init__()
        self.spec, self.build, self.size = s, build, s.num_heads * s.head_dim
        self.into = Linear(build.dim, {f"{part}_proj": self.size for part in "qkvg"}, build)
        self.norm = Norm(s.norm, (self.size,), build)
        self.out = Linear(self.size, {"o_proj": build.dim}, build)
        slopes = s.rate * torch.exp2(torch.arange(1, s.num_heads + 1) * (-8 / s.num_heads))
        self.decay = torch.exp(-slopes)[:, None].to(build.device)  # [H, 1] float32

    def load(self, weights: Weights, name: str) -> None:
        self.into.load(weights, name)
        self.norm.load(weights, f"{name}.o_norm")
        self.out.load(weights, name)

    def heads(self, x: Normed, step: Ragged, cache: State) -> Tensor:
        """x [T, dim] -> what its heads found [T, H * D], which `out` takes."""
        s = self.spec
        qkv, gate = self.into.of(x).split((3 * self.size, self.size), -1)
        q, k, v = ops.act(qkv, "silu").unflatten(-1, (3 * s.num_heads, s.head_dim)).split(s.num_heads, 1)
        decay = self.decay.expand(len(v), s.num_heads, 1)
        y = ops.recurrence(
            *(v, q, k, decay, None),
            *(cache[0], step.rows, step.query_starts, self.build.in_chunks),
        )
        return self.norm(y.flatten(1)) * ops.act(gate, "sigmoid")
