"""Routing and grouping of tokens by expert."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quire.attention.reference import Reference
from quire.layers.base import Build
from quire.layers.moe import MoE
from quire.layers.norm import Norm, Normed, add
from quire.layers.rope import RopeTables
from quire.models import spec

DIM = 16
CPU = torch.device("cpu")
SPECS = {
    "softmax": spec.MoE(num_experts=6, top_k=2, expert=spec.MLP(hidden=12)),
    "chosen only": spec.MoE(num_experts=6, top_k=3, expert=spec.MLP(hidden=12), score="softmax_topk"),
    "one": spec.MoE(num_experts=6, top_k=1, expert=spec.MLP(hidden=12), renorm=False),
    "weighed inputs": spec.MoE(
        num_experts=6,
        top_k=1,
        expert=spec.MLP(hidden=12),
        score="sigmoid_topk",
        renorm=False,
        shared=spec.MLP(hidden=8),
        weighs_inputs=True,
    ),
    "no gates, biases": spec.MoE(
        num_experts=5,
        top_k=2,
        expert=spec.MLP(hidden=12, act="relu2", gated=False, bias=True),
        router_bias=True,
        shared=spec.MLP(hidden=8),
        shared_gate=True,
    ),
    "groups": spec.MoE(
        num_experts=8,
        top_k=2,
        expert=spec.MLP(hidden=12),
        score="sigmoid",
        groups=4,
        top_groups=2,
        correction=True,
        scale=2.5,
        shared=spec.MLP(hidden=20),
    ),
}


class RandomWeights:
    """A different tensor for every name."""

    def __contains__(self, name: str) -> bool:
        return True

    def tensor(self, name: str, *, shape: tuple[int, ...], rows: slice | None = None) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(name.encode()))) * 0.3


def build(s: spec.MoE) -> MoE:
    moe = MoE(s, Build(DIM, torch.float32, CPU, Reference(), RopeTables(1, CPU)))
    moe.load(RandomWeights(), "mlp")
    return moe


def expert(s: spec.MoE, i: int, x: Tensor) -> Tensor:
    """What one of them makes of a token, from its weights as they are in a checkpoint."""

    def product(part: str, outputs: int, x: Tensor) -> Tensor:
        weight = RandomWeights().tensor(f"mlp.experts.{i}.{part}.weight", shape=(outputs, len(x)))
        if not s.expert.bias:
            return weight @ x
        return weight @ x + RandomWeights().tensor(f"mlp.experts.{i}.{part}.bias", shape=(outputs,))

    up = product("up_proj", s.expert.hidden, x)
    gate = F.silu(product("gate_proj", s.expert.hidden, x)) if s.expert.gated else up.relu()
    return product("down_proj", DIM, up.relu() * gate if s.expert.act == "relu2" else up * gate)


@pytest.mark.parametrize("name", SPECS)
def test_only_chosen_experts_are_weighed_and_summed(name: str) -> None:
    s, moe = SPECS[name], build(SPECS[name])
    x = torch.randn(9, DIM, generator=torch.Generator().manual_seed(0))
    experts, weights = moe.router(Normed(x))
    assert all(len(set(row)) == s.top_k for row in experts.tolist())
    if s.renorm:
        torch.testing.assert_close(weights.sum(-1), torch.full((9,), s.scale))

    def share(e: int, w: Tensor, x: Tensor) -> Tensor:
        return expert(s, e, w * x) if s.weighs_inputs else w * expert(s, e, x)

    chosen = zip(experts.tolist(), weights, x, strict=True)
    want = torch.stack([sum(share(e, w, x) for e, w in zip(es, ws, strict=True)) for es, ws, x in chosen])
    if moe.shared is not None:
        gate = 1.0 if moe.shared_gate is None else moe.shared_gate(x).sigmoid()
        want = want + gate * moe.shared(x)
    torch.testing.assert_close(moe(x), want, rtol=1e-5, atol=1e-5)


def test_experts_come_from_the_best_groups_only() -> None:
    s, moe = SPECS["groups"], build(SPECS["groups"])
    x = torch.randn(50, DIM, generator=torch.Generator().manual_seed(1))
    experts, weights = moe.router(Normed(x))
    scores = moe.router.gate(x).sigmoid()
    assert moe.router.correction is not None
    grouped = (scores + moe.router.correction).unflatten(-1, (s.groups, -1))
    best = grouped.topk(2, -1).values.sum(-1).topk(s.top_groups, -1).indices
    for row, allowed in zip((experts // 2).tolist(), best.tolist(), strict=True):
        assert set(row) <= set(allowed)
    chosen = scores.gather(-1, experts.long())
    torch.testing.assert_close(weights, chosen / chosen.sum(-1, keepdim=True) * s.scale)


def test_a_tokens_result_does_not_depend_on_the_others() -> None:
    moe = build(SPECS["groups"])
    x = torch.randn(40, DIM, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(moe(x)[7:9], moe(x[7:9]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SPECS)
def test_sum_and_norm_are_those_of_separate_operations(name: str) -> None:
    moe = build(SPECS[name])
    x, residual = torch.randn(2, 9, DIM, generator=torch.Generator().manual_seed(3))
    for following in (Norm(spec.Norm(eps=1e-6, weight=False), (DIM,), moe.router.build), None):
        total, normed = moe.added(Normed(x), residual, None, following)
        want = add(moe(x), residual, None, following)
        assert torch.equal(total, want[0]) and torch.equal(normed.tensor(), want[1].tensor())
