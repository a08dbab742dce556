"""Sparse experts: a router chooses a few for each token, and each expert computes its tokens only."""

from typing import cast

import torch
from torch import Tensor, nn

from quire.kernels import ops
from quire.layers.base import Build, Weights
from quire.layers.linear import Linear
from quire.layers.mlp import MLP
from quire.models import spec


class Router(nn.Module):
    """Which experts a token goes to, and with what weights. Scores are float32."""

    def __init__(self, s: spec.MoE, build: Build):
        super().__init__()
        self.spec, self.build = s, build
        self.gate = Linear(build.dim, {"gate": s.num_experts}, build, bias=s.router_bias)
        self.correction: Tensor | None = None

    def load(self, weights: Weights, name: str) -> None:
        self.gate.load(weights, name)
        if self.spec.correction:
            key = f"{name}.gate.e_score_correction_bias"
            self.correction = self.build.pull(weights, key, self.spec.num_experts, dtype=torch.float32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, dim] -> experts [T, top_k] int64, their weights [T, top_k] float32."""
        s, scores = self.spec, self.gate(x, torch.float32)
        if s.score == "softmax":
            scores = scores.softmax(-1)
        elif s.score == "sigmoid":
            scores = ops.act(scores, "sigmoid")
        choice = scores if self.correction is None else scores + self.correction
        if s.groups > 1:
            choice = self._best_groups(choice)
        experts = choice.topk(s.top_k, -1).indices
        weights = scores.gather(-1, experts)
        if s.score == "softmax_topk":
            weights = weights.softmax(-1)
        elif s.renorm:
            weights = weights / weights.sum(-1, keepdim=True)
        return experts, weights * s.scale

    def _best_groups(self, choice: Tensor) -> Tensor:
        """Rule out all experts but those of the best groups (DeepSeek-V2; by their two best in V3)."""
        s = self.spec
        grouped = choice.unflatten(-1, (s.groups, -1))
        best = grouped.amax(-1) if self.correction is None else grouped.topk(2, -1).values.sum(-1)
        ruled_out = torch.ones_like(best, dtype=torch.bool)
        ruled_out.scatter_(-1, best.topk(s.top_groups, -1).indices, False)
        return grouped.masked_fill(ruled_out[..., None], -torch.inf).flatten(-2)


class MoE(nn.Module):
    """Routed experts, and a shared one where the spec has it."""

    def __init__(self, s: spec.MoE, build: Build):
        super().__init__()
        self.spec = s
        self.router = Router(s, build)
        self.experts = nn.ModuleList(MLP(s.expert, build) for _ in range(s.num_experts))
        self.shared = MLP(s.shared, build) if s.shared else None
        self.shared_gate = Linear(build.dim, {"shared_expert_gate": 1}, build) if s.shared_gate else None

    def load(self, weights: Weights, name: str) -> None:
        self.router.load(weights, name)
        for i, expert in enumerate(self.experts):
            cast(MLP, expert).load(weights, f"{name}.experts.{i}")
        if self.shared is not None:
            self.shared.load(weights, f"{name}.shared")
        if self.shared_gate is not None:
            self.shared_gate.load(weights, name)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, dim] -> [T, dim]."""
        y = self._routed(x)
        if self.shared is not None:
            z = self.shared(x)
            y = y + (z if self.shared_gate is None else z * ops.act(self.shared_gate(x), "sigmoid"))
        return y

    def _routed(self, x: Tensor) -> Tensor:
        chosen, weights = self.router(x)
        order = chosen.flatten().argsort(stable=True)  # (token, choice) pairs, expert by expert
        tokens, weights = order // self.spec.top_k, weights.flatten()[order, None]
        # Sums are float32 and in the order of the experts: a token's result does not depend on the others.
        y = torch.zeros_like(x, dtype=torch.float32)
        start = 0
        for i, count in enumerate(chosen.flatten().bincount(minlength=self.spec.num_experts).tolist()):
            if count:
                rows = tokens[start : start + count]
                y[rows] += self.experts[i](x[rows]).float() * weights[start : start + count]
                start += count
        return y.to(x.dtype)
