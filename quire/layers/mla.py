"""Multi-head latent attention (DeepSeek-V2), absorbed: queries and outputs move to the latent space.

The cache holds one latent and one rotated key per token:  | latent: kv_rank | key: rope_dim |
A head's score is q_nope @ W_uk . latent + q_rope . key, and its value W_uv @ latent.
"""

from typing import Any

import torch
from torch import Tensor, nn

from quire.attention import sparse
from quire.attention.base import LayerCache, Ragged
from quire.kernels import ops
from quire.layers.base import Build, Weights
from quire.layers.indexer import Indexer
from quire.layers.linear import Linear
from quire.layers.norm import Norm, Normed
from quire.layers.rope import grown
from quire.models import spec
from quire.parallel.axis import Axis


class MLA(nn.Module):
    """Attends with one key head of kv_rank + rope_dim shared by all heads."""

    def __init__(self, s: spec.MLA, build: Build, axis: Axis | None = None):
        """`axis`: whose ranks have heads each, and all of the latents."""
        super().__init__()
        self.spec, self.build = s, build
        q = s.num_heads * (s.nope_dim + s.rope_dim)
        latent = {"kv_a_proj_with_mqa": s.kv_rank + s.rope_dim}
        if s.q_rank:
            self.down = Linear(build.dim, {"q_a_proj": s.q_rank} | latent, build)
            self.q_norm: Norm | None = Norm(s.norm, (s.q_rank,), build)
            self.q_up: Linear | None = Linear(s.q_rank, {"q_b_proj": q}, build)
        else:
            self.down = Linear(build.dim, {"q_proj": q} | latent, build)
            self.q_norm = self.q_up = None
        self.kv_norm = Norm(s.norm, (s.kv_rank,), build)
        self.gate = Linear(build.dim, {"g_proj": s.num_heads}, build) if s.gate else None
        own = s.indexer is not None and s.indexer.own
        self.indexer = Indexer(s.indexer, s.q_rank or 0, build) if s.indexer and own else None
        self.out = Linear(s.num_heads * s.v_dim, {"o_proj": build.dim}, build, axis=axis)
        self.table = build.ropes.table(s.rope) if s.rope else None
        self.scale = (s.nope_dim + s.rope_dim) ** -0.5 if s.scale is None else s.scale
        self.up_k: Any = None  # [H, kv_rank, nope_dim], or packed
        self.up_v: Any = None  # [H, v_dim, kv_rank], or packed

    def load(self, weights: Weights, name: str) -> None:
        s = self.spec
        self.down.load(weights, name)
        if self.q_norm is not None and self.q_up is not None:
            self.q_norm.load(weights, f"{name}.q_a_layernorm")
            self.q_up.load(weights, name)
        self.kv_norm.load(weights, f"{name}.kv_a_layernorm")
        self.out.load(weights, name)
        if self.gate is not None:
            self.gate.load(weights, name)
        if self.indexer is not None:
            self.indexer.load(weights, f"{name}.indexer")
        rows = s.num_heads * (s.nope_dim + s.v_dim)
        up = self.build.pull(weights, f"{name}.kv_b_proj.weight", rows, s.kv_rank)
        up_k, up_v = up.unflatten(0, (s.num_heads, -1)).split((s.nope_dim, s.v_dim), 1)
        self.up_k, self.up_v = self.build.pack(up_k.transpose(1, 2)), self.build.pack(up_v)

    def heads(self, x: Normed, step: Ragged, cache: LayerCache | tuple[LayerCache, LayerCache]) -> Tensor:
        """x [T, dim] -> what its heads found [T, H * v_dim], which `out` takes; of an indexer, with its keys' cache."""
        s, backend = self.spec, self.build.backend
        latents, index = cache if isinstance(cache, tuple) else (cache, None)
        seen = step.seen_by(latents, None)
        both = self.down.of(x)
        q, latent = both.split((both.shape[-1] - s.kv_rank - s.rope_dim, s.kv_rank + s.rope_dim), -1)
        if self.q_norm is not None and self.q_up is not None:
            q = self.q_norm(q)
            if self.indexer is not None and index is not None:
                self.build.choice.chosen = self.indexer(x, q, step, index)
            q = self.q_up(q)
        q_nope, q_rope = q.unflatten(-1, (s.num_heads, -1)).split((s.nope_dim, s.rope_dim), -1)
        latent, k_rope = latent.split((s.kv_rank, s.rope_dim), -1)
        rotated = torch.cat((q_rope, k_rope[:, None]), 1)
        if s.rope is not None and self.table is not None:
            rotated = ops.norm_rope(rotated, None, 0.0, *self.table, step.positions, s.rope.interleaved)
        backend.write(latents, torch.cat((self.kv_norm(latent), rotated[:, -1]), -1)[:, None], None, seen)
        absorbed = ops.linear(q_nope, self.up_k, None)  # [T, H, kv_rank]
        queries = grown(torch.cat((absorbed, rotated[:, :-1]), -1), s.growth, step.positions)
        chosen = self.build.choice.chosen if s.indexer else None
        if chosen is None:
            y = backend.attend(queries, latents, seen, scale=self.scale)
        else:
            y = sparse.attend(backend, queries, latents, chosen, scale=self.scale)
        found = ops.linear(y, self.up_v, None)
        if self.gate is not None:
            found = found * ops.act(self.gate.of(x), "sigmoid")[..., None]
        return found.flatten(1)
