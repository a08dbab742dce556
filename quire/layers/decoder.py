"""A decoder-only network: embedding, blocks, final norm, head."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from quire.attention.base import Backend, Cache, Ragged, layer_caches
from quire.attention.groups import Layout
from quire.attention.parted import parted
from quire.attention.views import Place, places, seen_from
from quire.kernels import ops
from quire.layers.altup import AltUpBlock, Streams
from quire.layers.attention import chunk_of
from quire.layers.balance import Balancer
from quire.layers.base import Build, Spreading, Weights
from quire.layers.block import Block, Spread
from quire.layers.embeddings import LayerEmbeddings
from quire.layers.linear import Linear
from quire.layers.moe import MoE
from quire.layers.norm import Norm, Normed, normed
from quire.layers.relay import Begun, Relay
from quire.layers.rope import RopeTables
from quire.layers.shards import Shards
from quire.models import spec
from quire.models.shard import WholeExperts, is_cut, shard
from quire.models.stages import Stage, layers_of, stages
from quire.parallel.axis import Axes, Axis
from quire.parallel.vocabulary import Vocabulary


class Decoder(nn.Module):
    """Computes a spec over the paged cache. Holds no weights until `load`."""

    def __init__(
        self,
        s: spec.Decoder,
        *,
        backend: Backend,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        max_length: int | None = None,
        invariant: bool = False,
        bits: int | None = None,
        axes: Axes | None = None,
        experts: WholeExperts | None = None,
    ):
        """Of an `invariant` network and backend, a sequence's results do not depend on its company, to the bit.

        `max_length`: the longest sequence that will come; None for the model's own limit. `bits`: those that weights
        of products are quantized to while they load, the head's to 8 at least. `axes`: whose ranks compute it together,
        each its `share` of it: of its `stage`'s layers, and of each of these. `experts`: that they are whole, and
        spread over `axes.ep`; else each is cut along tp.

        Raises:
            ConfigError: it cannot be shared out evenly, be cut into so many stages, or attend to parts of a cache.
        """
        super().__init__()
        self.axes = axes or Axes()
        tp, pp = self.axes.tp, self.axes.pp
        stage = stages(s, pp.size)[pp.rank]
        self.spec, self.share = s, layers_of(shard(s, tp.size, tp.rank, experts), stage)
        backend = parted(backend, self.axes.cp)
        device = torch.device(device)
        ropes = RopeTables(max_length or s.max_length, device)
        spreading = None if experts is None else Spreading(self.axes, experts)
        self.build = Build(s.dim, dtype, device, backend, ropes, invariant, bits, spreading)
        self.embed_scale = torch.tensor(s.embed_scale, dtype=dtype).item()  # Gemma's is rounded so
        self.layers = nn.ModuleList(map(self._layer, s.blocks[stage.layers], self.share.blocks))
        self.relay = Relay(s, stage, pp, self.build)
        altup = s.blocks[0].altup
        self.streams = Streams(altup, self.build) if altup else None
        if stage.is_last and spreading is None and isinstance(last := self.layers[-1], Block):
            last.picks = last.is_plain
        if spreading is not None:
            _connect(spreading, [part for part in self.modules() if isinstance(part, MoE)])
        self.norm = Norm(s.norm, (s.dim,), self.build)
        self.embed_norm = Norm(s.embed_norm, (s.dim,), self.build) if s.embed_norm else None
        parts = [block.embedding for block in s.blocks if block.embedding]
        self.layer_embeddings = LayerEmbeddings(parts, s.layer_rows, self.build) if parts else None
        head = {"lm_head": self.share.vocab_size}
        self.head = Linear(s.dim, head, self.build, bias=s.head_bias, least_bits=8)
        self.embedding: Any = None  # of a first stage, what `ops.embed` takes: this rank's rows [R, dim]
        self.positions: Tensor | None = None  # [num_positions, dim]
        self.places = frozenset[Place]()  # of layers that see a step otherwise than as it is

    @property
    def backend(self) -> Backend:
        """How attention is computed."""
        return self.build.backend

    @property
    def stage(self) -> Stage:
        """Which layers this rank has."""
        return self.relay.stage

    @property
    def vocabulary(self) -> Vocabulary:
        """Which tokens' logits this rank has."""
        return Vocabulary(self.spec.vocab_size, self.share.vocab_size, self.axes.tp)

    def load(self, weights: Weights) -> None:
        """Pull every weight, layer by layer, so that at most one layer is held twice."""
        axis = self.axes.tp
        with self.build.upload:
            self._load(weights if axis.size == 1 else Shards(weights, self.spec, axis.size, axis.rank))

    def _load(self, weights: Weights) -> None:
        s, stage, table = self.spec, self.stage, cast(Any, None)
        if stage.is_first or (stage.is_last and s.tied):
            table = self.build.pull(weights, "embed_tokens.weight", self.share.vocab_size, s.dim)
        if stage.is_first:
            self._load_beginning(weights)
        for i, layer in enumerate(self.layers, stage.first):
            cast(Block, layer).load(weights, f"layers.{i}")
        if stage.is_last:
            self.norm.load(weights, "norm")
            self.head.load(weights, "", shared=table if s.tied else None)
            if self.streams is not None:
                self.streams.load_gather(weights)
        if stage.is_first:
            self.embedding = ops.as_table(table, self.head.weight) if s.tied and stage.is_last else table

    def _load_beginning(self, weights: Weights) -> None:
        s, build = self.spec, self.build
        if s.num_positions:
            self.positions = build.pull(weights, "embed_positions.weight", s.num_positions, s.dim)
        if self.embed_norm is not None:
            self.embed_norm.load(weights, "embed_norm")
        if self.layer_embeddings is not None:
            self.layer_embeddings.load(weights)
        if self.streams is not None:
            self.streams.load_spread(weights)
        if s.sinusoids:
            self.positions = _sinusoids(s, build)

    def caches(self, pool: Tensor, states: Tensor | None = None, layout: Layout | None = None) -> list[Cache]:
        """Each layer's view of the memory; see `layer_caches`."""
        found = layer_caches(self.backend, self.share, pool, states, self.build.dtype, layout)
        chunks = (chunk_of(block.mixer, self.build) for block in self.share.blocks)
        self.places = places(found, chunks, self.axes.cp)
        return found

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, step: Ragged, caches: Sequence[Cache]) -> Tensor:
        """token_ids [T] int64 -> hidden [T, dim], or of `step.wanted` [R, dim], the final norm applied.

        Of a stage before the last [T, width]: what the next one gets.
        """
        if self.places:
            step = seen_from(step, self.places, self.backend.block_size, self.axes.cp)
        stage = self.stage
        begun = self._begin(token_ids, step) if stage.is_first else self.relay.receive(len(token_ids))
        last = self.norm if stage.is_last else None
        norms = [*(cast(Block, layer).attn_norm for layer in self.layers), last]
        x, y, own = begun.x, normed(begun.x, norms[0]), begun.own
        for i, (layer, cache, following) in enumerate(zip(self.layers, caches, norms[1:], strict=True)):
            if isinstance(cast(Block, layer).spec.mixer, spec.Guided):
                y = Normed(torch.cat((y.tensor(), begun.embedded), -1))
            x, y = layer(x, y, step, cache, following, None if own is None else own[i])
        if not stage.is_last:
            return self.relay.send(y.tensor(), begun)
        hidden = y.tensor() if self.streams is None else cast(Tensor, self.norm(self.streams.joined(x)))
        is_picked = step.wanted is None or (isinstance(layer, Block) and layer.picks)
        return hidden if is_picked else hidden[step.wanted]

    def _begin(self, token_ids: Tensor, step: Ragged) -> Begun:
        """What the first layer takes."""
        x = self._embed(token_ids)
        if self.positions is not None:
            x = x + ops.embed(step.positions + self.spec.position_offset, self.positions)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        own = None if self.layer_embeddings is None else self.layer_embeddings(token_ids, x)
        return Begun(x if self.streams is None else self.streams.split(x), x, own)

    def _layer(self, whole: spec.Block, part: spec.Block) -> nn.Module:
        spread = Spread(*(self.axes.tp if cut else Axis() for cut in is_cut(whole, part)))
        if part.altup:
            return AltUpBlock(part.altup, part, self.build, spread)
        return Block(part, self.build, spread)

    def _embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [T] -> [T, dim]; each is in one rank's rows."""
        if self.axes.tp.size == 1:
            return ops.embed(token_ids, self.embedding, self.embed_scale)
        first = self.vocabulary.own.start
        return self.axes.tp.all_reduce(ops.embed(token_ids, self.embedding, self.embed_scale, first))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, dim] -> [R, own] float32, of this rank's tokens (`vocabulary`)."""
        s, y = self.spec, self.head(hidden, torch.float32)[:, : len(self.vocabulary.own)]
        if s.logit_scale != 1.0:
            y = y * s.logit_scale
        return y if s.logit_softcap is None else s.logit_softcap * torch.tanh(y / s.logit_softcap)


def _connect(spreading: Spreading, layers: Sequence[MoE]) -> None:
    interval = spreading.experts.interval
    if interval is not None:
        spreading.between = Balancer(layers, spreading.axes.ep, interval).step

    def idle() -> None:
        for layer in layers:
            layer.idle()

    spreading.idle = idle


def _sinusoids(s: spec.Decoder, build: Build) -> Tensor:
    """Positions that no one learned (Vaswani et al. 2017) [positions, dim]."""
    angles = torch.arange(build.ropes.num_positions + s.position_offset)[:, None] / 10_000 ** (
        torch.arange(s.dim // 2, dtype=torch.float64) / s.sinusoids
    )
    return torch.cat((angles.sin(), angles.cos()), -1).to(build.device, build.dtype)
