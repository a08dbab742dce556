"""Linear attention that forgets at a fixed rate (MiniMax-Text-01, Ring-linear)."""

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
    """q, k, v and the gate in one product; activate, or normalise and rotate; recur; norm, gate; output."""

    def __init__(self, s: spec.Lightning, build: Build):
        super().__init__()
        self.spec, self.build, self.size = s, build, s.num_heads * s.head_dim
        self.into = Linear(build.dim, {f"{part}_proj": self.size for part in "qkvg"}, build)
        self.qk_norms = [Norm(s.qk_norm, (s.head_dim,), build) for _ in "qk"] if s.qk_norm else []
        self.table = build.ropes.table(s.rope) if s.rope else None
        self.norm = Norm(s.norm, (self.size,), build)
        self.out = Linear(self.size, {"o_proj": build.dim}, build)
        slopes = s.rate * torch.exp2(torch.arange(1, s.num_heads + 1) * (-8 / s.num_heads))
        self.decay = torch.exp(-slopes)[:, None].to(build.device)  # [H, 1] float32

    def load(self, weights: Weights, name: str) -> None:
        self.into.load(weights, name)
        for part, norm in zip("qk", self.qk_norms, strict=False):
            norm.load(weights, f"{name}.{part}_norm")
        self.norm.load(weights, f"{name}.o_norm")
        if self.norm.weight is not None and self.spec.groups > 1:
            self.norm.weight = self.norm.weight.unflatten(0, (self.spec.groups, -1))
        self.out.load(weights, name)

    def heads(self, x: Normed, step: Ragged, cache: State) -> Tensor:
        """x [T, dim] -> what its heads found [T, H * D], which `out` takes."""
        s = self.spec
        qkv, gate = self.into.of(x).split((3 * self.size, self.size), -1)
        heads = (ops.act(qkv, "silu") if s.activated else qkv).unflatten(-1, (-1, s.head_dim))
        q, k, v = heads.split(s.num_heads, 1)
        q, k = (self._placed(part, i, step.positions) for i, part in enumerate((q, k)))
        q = q if s.scale == 1.0 else q * s.scale
        decay = self.decay.expand(len(v), s.num_heads, 1)
        y = ops.recurrence(
            *(v, q, k, decay, None),
            *(cache[0], step.rows, step.query_starts, self.build.in_chunks),
        )
        y = y.flatten(1) if s.groups == 1 else y.flatten(1).unflatten(1, (s.groups, -1))
        return self.norm(y).flatten(1) * ops.act(gate, "sigmoid")

    def _placed(self, x: Tensor, which: int, positions: Tensor) -> Tensor:
        """Queries or keys [T, H, D], normalised and rotated."""
        if self.qk_norms:
            x = self.qk_norms[which](x)
        if self.spec.rope is None or self.table is None:
            return x
        return ops.norm_rope(x, None, 0.0, *self.table, positions, self.spec.rope.interleaved)
