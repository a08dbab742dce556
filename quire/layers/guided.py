"""State spaces guided by attention and a feed-forward layer that other layers have, too (Zamba, Zamba2).

What a layer adds to shared products stays apart: merged, weights would be one copy for each use, and take half as much
memory again.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quire.attention.base import LayerCache, Ragged
from quire.attention.states import State
from quire.layers.attention import Attention
from quire.layers.base import Build, Weights
from quire.layers.linear import Linear
from quire.layers.mamba import Mamba, Mamba2
from quire.layers.mlp import MLP
from quire.layers.norm import Norm, Normed
from quire.models import spec
from quire.models.parameters import additions


class Addition(nn.Module):
    """b(a(x)) of each part, side by side, with `rank` numbers in between (Hu et al. 2021)."""

    def __init__(self, inputs: int, rank: int, parts: Mapping[str, int], build: Build):
        super().__init__()
        self.rank = rank
        self.down = Linear(inputs, {f"{part}_a": rank for part in parts}, build)
        self.up = [Linear(rank, {f"{part}_b": rows}, build) for part, rows in parts.items()]

    def load(self, weights: Weights, name: str) -> None:
        for product in (self.down, *self.up):
            product.load(weights, name)

    def of(self, x: Normed) -> Tensor:
        """x [T, inputs] -> [T, rows of all parts]."""
        low = self.down.of(x).split(self.rank, -1)
        return torch.cat([up(y) for up, y in zip(self.up, low, strict=True)], -1)


class Common(nn.Module):
    """What layers have in common: attention, a feed-forward layer and the norms before them; no residuals."""

    def __init__(self, s: spec.Guided, build: Build):
        super().__init__()
        self.attn_norm = Norm(s.norm, (2 * build.dim,), build)
        self.attention = Attention(s.attention, build)
        self.mlp_norm = Norm(s.norm, (build.dim,), build)
        self.mlp = MLP(s.mlp, build)

    def load(self, weights: Weights, name: str) -> None:
        self.attn_norm.load(weights, f"{name}.attn_norm")
        self.attention.load(weights, f"{name}.attention")
        self.mlp_norm.load(weights, f"{name}.mlp_norm")
        self.mlp.load(weights, f"{name}.mlp")


class Guided(nn.Module):
    """Attention, feed-forward layer, guide; states of the sum of that and the input."""

    def __init__(self, s: spec.Guided, build: Build):
        super().__init__()
        self.spec, self.dim = s, build.dim
        self.is_first = s.shared not in build.shared  # and so the one that loads what is shared
        if self.is_first:
            build.shared[s.shared] = Common(s, build)
        self.common: Common = build.shared[s.shared]
        sizes = additions(s, build.dim)
        qkv, up = {part: sizes[part][2] for part in "qkv"}, {"gate_up": sizes["gate_up"][2]}
        self.qkv = Addition(sizes["q"][1], s.qkv_rank, qkv, build) if s.qkv_rank else None
        self.up = Addition(build.dim, s.up_rank, up, build) if s.up_rank else None
        self.guide = Linear(build.dim, {"guide": build.dim}, build)
        self.norm = Norm(s.norm, (build.dim,), build)
        self.states = Mamba(s.states, build) if isinstance(s.states, spec.Mamba) else Mamba2(s.states, build)
        self.out = self.states.out

    def load(self, weights: Weights, name: str) -> None:
        if self.is_first:
            self.common.load(weights, f"shared.{self.spec.shared}")
        for addition in (self.qkv, self.up):
            if addition is not None:
                addition.load(weights, name)
        self.guide.load(weights, name)
        self.norm.load(weights, f"{name}.norm")
        self.states.load(weights, f"{name}.states")

    def heads(self, x: Normed, step: Ragged, cache: tuple[LayerCache, State]) -> Tensor:
        """x [T, 2 * dim], the residual beside the embedding -> what `out` takes."""
        common, both, (keys, state) = self.common, x.tensor(), cache
        y = Normed(common.attn_norm(both))
        more = None if self.qkv is None else self.qkv.of(y)
        y = Normed(common.mlp_norm(common.attention.out(common.attention.heads(y, step, keys, more))))
        more = None if self.up is None else self.up.of(y)
        guidance = self.guide(common.mlp.down(common.mlp.hidden(y, more)))
        return self.states.heads(Normed(self.norm(both[:, : self.dim] + guidance)), step, state)
