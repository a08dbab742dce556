"""Experts that move between ranks by what is measured: the same results, and about as much to do for all."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.attention.reference import Reference
from quire.layers.balance import Balancer
from quire.layers.base import Build, Spreading
from quire.layers.moe import MoE
from quire.layers.rope import RopeTables
from quire.models import spec
from quire.models.shard import WholeExperts
from quire.parallel.axis import Axes, Axis
from tests.layers.test_moe import RandomWeights
from tests.parallel.threads import in_ranks

DIM, SIZE, INTERVAL, NUM_ROWS = 64, 4, 3, 64
MLP = spec.MLP(hidden=64, bias=True)
WHOLE = spec.MoE(num_experts=8, top_k=2, expert=MLP, router_bias=True)
POPULAR = torch.tensor([0.0, -1.0, 0.5, 0.0, 2.0, -2.0, 6.0, 5.0])  # how much the router likes each


class Skewed(RandomWeights):
    """Of a router to which few experts are much better than the others."""

    def tensor(self, name: str, *, shape: tuple[int, ...], rows: slice | None = None) -> Tensor:
        if name.endswith("gate.bias"):
            return POPULAR
        return super().tensor(name, shape=shape, rows=rows)


def layer(axis: Axis, way: str, bits: int | None) -> MoE:
    experts = WholeExperts(axis.size, 1, way, INTERVAL)
    axes = Axes(tp=axis, ep=axis, world=axis)
    build = Build(
        DIM,
        torch.float32,
        torch.device("cpu"),
        Reference(),
        RopeTables(1, "cpu"),
        bits=bits,
        spreading=Spreading(axes, experts),
    )
    found = MoE(replace(WHOLE, held=experts.num_slots(WHOLE)), build)
    found.load(Skewed(), "mlp")
    return found


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("way", ["allgather_reducescatter", "all_to_all"])
def test_what_is_skewed_becomes_even_and_results_stay(way: str, bits: int | None) -> None:
    x = torch.randn(NUM_ROWS, DIM, generator=torch.Generator().manual_seed(1))

    def life(axis: Axis) -> tuple[list[Tensor], list[list[float]], Any]:
        moe = layer(axis, way, bits)
        assert moe.dispatch is not None
        balancer = Balancer([moe], axis, INTERVAL)
        made, loads, before = [], [], moe.dispatch.placement
        for _ in range(2 * INTERVAL + 1):
            balancer.step()
            made.append(moe(x))
            loads.append(axis.all_reduce(moe.dispatch.load.clone()).tolist())
        return made, loads, (before, moe.dispatch.placement)

    made, loads, (before, after) = in_ranks(SIZE, life)[0]
    load = loads[INTERVAL - 2]
    assert sum(load) == (INTERVAL - 1) * NUM_ROWS * WHOLE.top_k, "each token is counted once"
    mean = sum(load) / SIZE
    assert max(before.loads(load)) > 1.4 * mean and max(after.loads(load)) < 1.15 * mean
    for one in made[1:]:
        torch.testing.assert_close(one, made[0], rtol=0, atol=1e-4 * float(made[0].abs().max()))
