"""Sparse experts: a router chooses a few for each token, and each expert computes its tokens only."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from quire.kernels import ops
from quire.layers.base import Build, Weights
from quire.layers.dispatch import Dispatch
from quire.layers.linear import EXACT, Linear
from quire.layers.mlp import MLP
from quire.layers.norm import Norm, Normed, add, rms_of
from quire.models import spec
from quire.parallel.axis import Axis


class Router(nn.Module):
    """Which experts a token goes to, and with what weights. Scores are float32."""

    def __init__(self, s: spec.MoE, build: Build):
        super().__init__()
        self.spec, self.build = s, build
        self.rule = ops.Rule(s.top_k, s.score, s.renorm, s.scale, s.groups, s.top_groups)
        self.gate = Linear(build.dim, {"gate": s.num_experts}, build, bias=s.router_bias, least_bits=EXACT)
        self.correction: Tensor | None = None

    def load(self, weights: Weights, name: str) -> None:
        self.gate.load(weights, name)
        if self.spec.correction:
            key = f"{name}.gate.e_score_correction_bias"
            self.correction = self.build.pull(weights, key, self.spec.num_experts, dtype=torch.float32)

    def forward(self, y: Normed) -> ops.Routes:
        """y [T, dim] -> experts and their weights, [T, top_k]."""
        return ops.route(self.gate.of(y, torch.float32), self.rule, self.correction)


class Experts(nn.Module):
    """The experts of a layer that are held here, their weights side by side."""

    def __init__(self, s: spec.MoE, build: Build, axis: Axis, held: Sequence[int]):
        super().__init__()
        self.spec, self.build, self.held = s, build, held
        self.one = MLP(s.expert, build, axis)  # holds no weights: how one expert's are named and shaped
        self.stack: ops.Experts | None = None

    def load(self, weights: Weights, name: str) -> None:
        s, one = self.spec, self.one
        self.stack = ops.Experts(
            up=self._weights(one.up, weights, name),
            down=self._weights(one.down, weights, name),
            up_bias=self._biases(one.up, weights, name),
            down_bias=self._biases(one.down, weights, name),
            act=s.expert.act,
            gated=s.expert.gated,
            invariant=self.build.invariant,
            limit=s.expert.limit,
            total=0 if self.spec.held is None else self.spec.num_experts,
        )

    def _weights(self, part: Linear, weights: Weights, name: str) -> object:
        pulled = (part.pull_weight(weights, f"{name}.{i}") for i in self.held)
        return ops.pack_experts(next(pulled), pulled, len(self.held), part.pack)

    def _biases(self, part: Linear, weights: Weights, name: str) -> Tensor | None:
        found = [part.pull_bias(weights, f"{name}.{i}") for i in self.held]
        present = [bias for bias in found if bias is not None]
        return torch.stack(present) if present else None


class Apart(nn.Module):
    """Routed experts that see the stream through norms of their own, beside a shared one."""

    def __init__(self, s: spec.Apart, num_experts: int, build: Build):
        super().__init__()
        self.spec, self.num_experts, self.build = s, num_experts, build
        names = "router_norm", "experts_norm", "experts_post_norm", "shared_post_norm"
        self.norms = nn.ModuleDict({name: Norm(s.norm, (build.dim,), build) for name in names})
        self.scale: Tensor | None = None

    def load(self, weights: Weights, name: str) -> None:
        for part, norm in self.norms.items():
            cast(Norm, norm).load(weights, f"{name}.{part}")
        self.scale = self.build.pull(
            weights, f"{name}.gate.per_expert_scale", self.num_experts, dtype=torch.float32
        )

    def seen(self, x: Tensor, router: Router) -> tuple[Tensor, None, ops.Routes]:
        """The stream x [T, dim] as experts see it, and where it goes."""
        routes = router(Normed(self.norms["router_norm"](x) * self.spec.router_scale))
        if self.scale is not None:
            routes = routes._replace(weights=routes.weights * self.scale[routes.experts.long()])
        return self.norms["experts_norm"](x), None, routes

    def joined(self, found: Tensor, shared: Tensor) -> Tensor:
        """What the experts made of the stream and the shared one of another norm of it, [T, dim] each -> [T, dim]."""
        return ops.add(self.norms["experts_post_norm"](found), self.norms["shared_post_norm"](shared))


class MoE(nn.Module):
    """Routed experts, and a shared one where the spec has it."""

    def __init__(self, s: spec.MoE, build: Build, axis: Axis | None = None):
        """`axis`: whose ranks have hidden numbers of each expert, or, if these are spread whole, of the shared one."""
        super().__init__()
        self.spec, self.build, self.axis = s, build, axis or Axis()
        self.router = Router(s, build)
        self.dispatch: Dispatch | None = None
        if s.held is not None and build.spreading is not None:
            self.dispatch = Dispatch(s, build, build.spreading)
            self.experts = Experts(s, build, Axis(), self.dispatch.held)
        else:
            self.experts = Experts(s, build, self.axis, range(s.num_experts))
        self.shared = MLP(s.shared, build, self.axis, partial=True) if s.shared else None
        self.shared_gate: Linear | None = None
        self.apart = Apart(s.apart, s.num_experts, build) if s.apart else None
        if s.shared_gate:
            self.shared_gate = Linear(build.dim, {"shared_expert_gate": 1}, build, least_bits=EXACT)

    def load(self, weights: Weights, name: str) -> None:
        self.router.load(weights, name)
        self.experts.load(weights, f"{name}.experts")
        if self.shared is not None:
            self.shared.load(weights, f"{name}.shared")
        if self.shared_gate is not None:
            self.shared_gate.load(weights, name)
        if self.apart is not None:
            self.apart.load(weights, name)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, dim] -> [T, dim]."""
        return self._mixed(Normed(x))

    def idle(self) -> None:
        """Take part in the step of others, who have tokens, with none."""
        if self.dispatch is not None:
            build = self.build
            self._mixed(Normed(torch.empty(0, build.dim, dtype=build.dtype, device=build.device)))

    def added(
        self, y: Normed, residual: Tensor, post: Norm | None, following: Norm | None
    ) -> tuple[Tensor, Normed]:
        """(residual + post(this of y), its norm): one operation where that is all RMS norm and no post."""
        if self.apart is not None and self.shared is not None:
            seen = self.axis.all_reduce(self.shared.down(self.shared.hidden(y)))
            made = self.apart.joined(self._mixed(Normed(residual.to(y.values.dtype))), seen)
            return add(made, residual, post, following)
        norm = rms_of(following)
        if norm is None or post is not None or self.axis.size > 1 or self.dispatch is not None:
            return add(self._mixed(y), residual, post, following)
        inputs = *self._routed(y), self.experts.stack, self._shared(y)
        total, values, scale = ops.experts_add_norm(*inputs, residual, norm)
        return total, Normed(values, scale)

    def _mixed(self, y: Normed) -> Tensor:
        """y [T, dim] -> the sum of what experts make of it, the shared one's included unless that is apart."""
        if self.dispatch is not None and self.experts.stack is not None:
            return self.dispatch(y, self._routed, self.experts.stack, self._shared)
        return self.axis.all_reduce(ops.experts(*self._routed(y), self.experts.stack, self._shared(y)))

    def _routed(self, y: Normed) -> tuple[Tensor, ops.RowScale | None, ops.Routes]:
        """What experts see, what its rows have still to be multiplied by, and where they go."""
        if self.apart is not None:
            return self.apart.seen(y.tensor(), self.router)
        routes = self.router(y)
        if not self.spec.weighs_inputs:
            return y.values, y.scale, routes
        x = y.tensor()
        return (
            (x * routes.weights).to(x.dtype),
            None,
            routes._replace(weights=torch.ones_like(routes.weights)),
        )

    def _shared(self, y: Normed) -> ops.Shared | None:
        if self.shared is None or self.apart is not None:
            return None
        gate = None if self.shared_gate is None else self.shared_gate.of(y)
        return ops.Shared(self.shared.down(self.shared.hidden(y)), gate)
