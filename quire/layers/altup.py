"""Alternating updates: of several streams a layer computes one, and updates the others by it (Gemma 3n)."""

import math
from typing import cast

import torch
from torch import Tensor, nn

from quire.attention.base import LayerCache, Ragged
from quire.kernels import ops
from quire.layers.base import Build, Weights
from quire.layers.block import Block, Spread
from quire.layers.linear import EXACT, Linear
from quire.layers.norm import Norm, Normed, add, mean, normed
from quire.models import spec

LEAST_SQUARE = 1e-5  # the mean that a stream's squares have at least, when it is scaled


class Streams(nn.Module):
    """What a network begins and ends with: all streams from one, and one from all, each as large as the first."""

    def __init__(self, s: spec.AltUp, build: Build):
        super().__init__()

        def products(name: str) -> nn.ModuleList:
            count = range(s.num - 1)
            return nn.ModuleList(
                Linear(build.dim, {f"{name}.{i}": build.dim}, build, least_bits=EXACT) for i in count
            )

        self.spread, self.gather = products("altup_projections"), products("altup_unembed_projections")

    def load_spread(self, weights: Weights) -> None:
        """For `split`."""
        for product in self.spread:
            cast(Linear, product).load(weights, "")

    def load_gather(self, weights: Weights) -> None:
        """For `joined`."""
        for product in self.gather:
            cast(Linear, product).load(weights, "")

    def split(self, x: Tensor) -> Tensor:
        """x [T, dim] -> [num, T, dim]."""
        return torch.stack((x, *(_as_large(product(x), x) for product in self.spread)))

    def joined(self, streams: Tensor) -> Tensor:
        """Their mean, streams [num, T, dim] -> [T, dim]."""
        total = first = streams[0]
        for product, stream in zip(self.gather, streams[1:], strict=True):
            total = total + _as_large(product(stream), first)
        return total / len(streams)


def _as_large(x: Tensor, other: Tensor) -> Tensor:
    """x [T, dim] with the root mean square of `other`, row by row."""
    large, own = (mean(y.float().square()) for y in (other, x))
    return (x * (large.sqrt() / own.clamp(min=LEAST_SQUARE).sqrt())).to(x.dtype)


class AltUp(nn.Module):
    """A layer's prediction and correction of the streams."""

    def __init__(self, s: spec.AltUp, build: Build):
        super().__init__()
        self.spec, self.build = s, build
        self.router = Linear(build.dim, {"modality_router": s.num}, build, least_bits=EXACT)
        self.norm = Norm(s.norm, (build.dim,), build)
        self.predictor = Linear(s.num, {"prediction_coefs": s.num**2}, build, least_bits=EXACT)
        self.corrector = Linear(s.num, {"correction_coefs": s.num}, build, least_bits=EXACT)
        self.scale: Tensor | None = None  # [dim]

    def load(self, weights: Weights, name: str) -> None:
        for product in (self.router, self.predictor, self.corrector):
            product.load(weights, name)
        self.norm.load(weights, f"{name}.router_norm")
        self.scale = self.build.pull(weights, f"{name}.correct_output_scale", self.build.dim)

    def predict(self, streams: Tensor) -> Tensor:
        """[num, T, dim] -> the same."""
        num = self.spec.num
        coefs = self.predictor(self._kinds(streams[self.spec.active]), torch.float32)
        coefs = coefs.unflatten(-1, (num, num)).transpose(0, 1)  # [to, T, from]
        total = streams.float()
        for i in range(num):
            total = total + streams[i] * coefs[..., i : i + 1]
        return total.to(streams.dtype)

    def correct(self, streams: Tensor, computed: Tensor) -> Tensor:
        """Predicted streams [num, T, dim], and what the layer made of the active one [T, dim]."""
        coefs = self.corrector(self._kinds(computed), torch.float32).t()[..., None] + 1.0
        return (streams + (computed - streams[self.spec.active]) * coefs).to(streams.dtype)

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.scale if self.spec.is_scaled and self.scale is not None else x

    def _kinds(self, x: Tensor) -> Tensor:
        """x [T, dim] -> [T, num], on which coefficients depend: tanh(router), by an operation of our own."""
        routed = self.router(self.norm(x), torch.float32) / self.build.dim
        return (2.0 * ops.act(2.0 * routed, "sigmoid") - 1.0).to(x.dtype)


class AltUpBlock(nn.Module):
    """A block that computes one of several streams, with a second residual beside attention; see spec.AltUp."""

    attn_norm = None  # is for the predicted stream, so nobody before can compute it

    def __init__(self, s: spec.AltUp, block: spec.Block, build: Build, spread: Spread):
        super().__init__()
        self.spec, self.block, self.altup = block, Block(block, build, spread), AltUp(s, build)
        self.left = Linear(build.dim, {"linear_left": s.rank}, build)
        self.right = Linear(s.rank, {"linear_right": build.dim}, build)
        self.norm = Norm(s.norm, (build.dim,), build)

    def load(self, weights: Weights, name: str) -> None:
        self.block.load(weights, name)
        self.altup.load(weights, f"{name}.altup")
        self.left.load(weights, f"{name}.laurel")
        self.right.load(weights, f"{name}.laurel")
        self.norm.load(weights, f"{name}.laurel.post_laurel_norm")

    def forward(
        self,
        x: Tensor,
        _: Normed,
        step: Ragged,
        cache: LayerCache,
        following: Norm | None,
        own: Tensor | None = None,
    ) -> tuple[Tensor, Normed]:
        """x [num, T, dim] -> the same. As of Block, but nothing is normalised for the next."""
        block, active = self.block, self.altup.spec.active
        streams = self.altup.predict(x)
        y = normed(streams[active], block.attn_norm)
        low = y.values + self.norm(self.right(self.left(y.values)))
        h, _ = add(
            block.mixer.out(block.mixer.heads(y, step, cache)), streams[active], block.attn_post_norm, None
        )
        h = ((h + low) * math.sqrt(0.5)).to(x.dtype)
        computed, _ = block.mlp.added(normed(h, block.mlp_norm), h, block.mlp_post_norm, None)
        streams = self.altup.correct(streams, computed.to(x.dtype))
        if block.embedding is not None and own is not None:
            more = block.embedding.norm(block.embedding(self.altup.scaled(streams[active]), own))
            streams = torch.cat((streams[:1], streams[1:] + more))
        return streams, Normed(streams)
