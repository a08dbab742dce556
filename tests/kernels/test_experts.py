"""Sparse experts on GPUs, in Triton's interpreter where there is none: any routing, any tile, token by token."""

import dataclasses
from itertools import product

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quire.kernels import ops  # noqa: E402
from quire.kernels.experts import (  # noqa: E402
    Experts,
    Routes,
    Rule,
    Shared,
    experts,
    experts_add_norm,
    route,
)
from quire.kernels.reference import RmsNorm, RowScale  # noqa: E402
from quire.kernels.triton.expert_tiles import ROWS, rows_for  # noqa: E402
from quire.kernels.triton.mixture import (  # noqa: E402
    arrange,
    experts_add_norm_triton,
    experts_triton,
    mix,
    multiply_down,
    multiply_down_alone,
    multiply_up,
    route_triton,
)
from quire.kernels.triton.tiles import Tile  # noqa: E402
from tests.interpreter import INTERPRETED  # noqa: E402  (it imports Triton)
from tests.kernels.test_kernels import noise  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
RULES = {
    "softmax": Rule(3),
    "not renormalised": Rule(2, renorm=False, scale=0.5),
    "one": Rule(1, renorm=False),
    "all": Rule(12),
    "chosen only": Rule(4, "softmax_topk"),
    "sigmoid": Rule(3, "sigmoid", scale=2.5),
    "sigmoid of the chosen": Rule(3, "sigmoid_topk", scale=2.5),
    "one by one": Rule(2, "sparse_mixer", renorm=False),
    "groups": Rule(2, "softmax", renorm=False, groups=4, top_groups=1),
    "corrected groups": Rule(4, "sigmoid", scale=2.5, groups=4, top_groups=2),
    "odd groups": Rule(4, "sigmoid", groups=3, top_groups=2),
}
LIMIT = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # relative to all numbers


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    return noise(*shape, dtype=dtype, seed=seed, scale=scale).to(DEVICE)


def off(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@dataclasses.dataclass(frozen=True)
class Layer:
    """Experts of some size and what surrounds them."""

    dim: int = 48
    hidden: int = 40
    count: int = 9
    gated: bool = True
    act: str = "silu"
    bias: bool = False
    dtype: torch.dtype = torch.float32
    limit: float | None = None

    def stack(self) -> Experts:
        up = self.hidden * (1 + self.gated)
        return Experts(
            draw(self.count, up, self.dim, dtype=self.dtype, seed=1, scale=self.dim**-0.5),
            draw(self.count, self.dim, self.hidden, dtype=self.dtype, seed=2, scale=self.hidden**-0.5),
            draw(self.count, up, dtype=self.dtype, seed=3) if self.bias else None,
            draw(self.count, self.dim, dtype=self.dtype, seed=4) if self.bias else None,
            self.act,
            self.gated,
            limit=self.limit,
        )

    def routes(self, num_tokens: int, top_k: int, kind: str = "any") -> Routes:
        """Of `kind` any, some (only the first experts), or one (all tokens to the same)."""
        scores = draw(num_tokens, self.count, seed=num_tokens)
        if kind != "any":
            scores[:, top_k:] = -100.0
        if kind == "one":
            scores[:] = torch.arange(self.count, device=DEVICE).float()
        return route.reference(scores, Rule(top_k), None)

    def shared(self, num_tokens: int, gate: bool) -> Shared:
        values = draw(num_tokens, self.dim, dtype=self.dtype, seed=5)
        return Shared(values, draw(num_tokens, 1, dtype=self.dtype, seed=6) if gate else None)


LAYERS = {
    "gated": Layer(),
    "odd": Layer(dim=33, hidden=21, count=5),
    "no gates, biases": Layer(gated=False, act="relu2", bias=True),
    "gates and biases": Layer(dim=80, hidden=70, act="gelu_pytorch_tanh", bias=True),
    "gates of their own": Layer(act="swiglu_oai", bias=True),
    "limited gates": Layer(limit=0.1, bias=True),
    "bfloat16": Layer(dtype=torch.bfloat16),
    "float16": Layer(dtype=torch.float16, bias=True),
}


@pytest.mark.parametrize("name", RULES)
def test_routes_equal_the_reference(name: str) -> None:
    rule = RULES[name]
    for num_tokens, count in ((1, 12), (9, 24)):
        logits = draw(num_tokens, count, seed=num_tokens, scale=2.0)
        for correction in (None, draw(count, seed=9)):
            got, want = route_triton(logits, rule, correction), route.reference(logits, rule, correction)
            assert torch.equal(got.experts, want.experts) and got.experts.dtype == want.experts.dtype
            torch.testing.assert_close(got.weights, want.weights, rtol=2e-6, atol=1e-7)
            part = route_triton(logits[-1:], rule, correction)
            assert torch.equal(part.weights, got.weights[-1:])


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's: of what is no number
def test_ties_go_to_the_first_and_what_is_no_number_harms_its_token_only() -> None:
    logits = torch.zeros(3, 12, device=DEVICE)
    logits[1], logits[2, 7] = torch.nan, torch.nan
    for rule in (Rule(4), Rule(4, "sigmoid"), Rule(4, "softmax_topk"), RULES["corrected groups"]):
        got = route_triton(logits, rule, torch.zeros(12, device=DEVICE))
        assert got.experts[0].tolist() == [0, 1, 2, 3] and bool(got.weights[0].isfinite().all())
        for row in got.experts.tolist():
            assert len(set(row)) == 4 and all(0 <= e < 12 for e in row)
        assert not bool(got.weights[1].isfinite().any())


@pytest.mark.parametrize("rows", ROWS[1:])
@pytest.mark.parametrize("kind", ["any", "some", "one"])
def test_pairs_are_arranged_by_expert(kind: str, rows: int) -> None:
    layer, top_k = LAYERS["gated"], 3
    for num_tokens in (1, 70):
        routes = layer.routes(num_tokens, top_k, kind)
        found = arrange(routes, layer.count, rows)
        pairs = routes.experts.flatten().long()
        assert torch.equal(found.order.long(), pairs.argsort(stable=True))
        covered: list[int] = []
        for expert, first, end in found.slots.T.tolist():
            if expert >= 0:
                assert 0 < end - first <= rows
                assert set(pairs[found.order[first:end].long()].tolist()) == {expert}
                covered += range(first, end)
        assert sorted(covered) == list(range(len(pairs)))


@pytest.mark.slow  # in the interpreter, in which many small programs take longest
@pytest.mark.parametrize("name", list(LAYERS)[1:])
def test_experts_of_one_token_equal_the_reference(name: str) -> None:
    test_experts_equal_the_reference(name, 1)


@pytest.mark.parametrize("invariant", [True, False])
def test_a_token_among_any_number_where_that_is_asked_for(invariant: bool) -> None:
    """The same bits alone and in company, for one order of sums; without it another order is taken for one token."""
    layer = LAYERS["gated"]
    x, stack = draw(9, layer.dim, scale=0.5), layer.stack()._replace(invariant=invariant)
    routes = layer.routes(9, 3)
    together = experts_triton(x, None, routes, stack, None)
    alone = experts_triton(x[:1], None, Routes(routes.experts[:1], routes.weights[:1]), stack, None)
    assert torch.equal(alone, together[:1]) or not invariant
    torch.testing.assert_close(alone, together[:1], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "num_tokens"), [("gated", 1), *product(LAYERS, (2, 18))])
def test_experts_equal_the_reference(name: str, num_tokens: int) -> None:
    layer, top_k = LAYERS[name], 3
    x, stack = draw(num_tokens, layer.dim, dtype=layer.dtype, scale=0.5), layer.stack()
    squares = RowScale(draw(num_tokens, 7, seed=8).square() + 1, 1e-6)
    residual = draw(num_tokens, layer.dim, dtype=layer.dtype, seed=10)
    for kind, scale, shared in (
        ("any", None, None),
        ("one", squares, layer.shared(num_tokens, False)),
        ("some", squares, layer.shared(num_tokens, True)),
    ):
        routes = layer.routes(num_tokens, top_k, kind)
        want = exact(x, scale, routes, stack, shared)
        got = experts_triton(x, scale, routes, stack, shared)
        assert got.dtype == layer.dtype and off(got, want) <= LIMIT[layer.dtype], kind
        for norm in (RmsNorm(draw(layer.dim, dtype=layer.dtype, seed=11), 1e-5, 1.0), RmsNorm(None, 1e-6)):
            given = (x, scale, routes, stack, shared, residual.float(), norm)
            total, values, left = experts_add_norm_triton(*given)
            plain = experts_add_norm.reference(x.float(), *raised(given[1:]))
            assert total.dtype == torch.float32 and off(total, plain[0]) <= LIMIT[layer.dtype], kind
            normed = ops.finish_norm.reference(values.float(), left)
            assert values.dtype == layer.dtype and off(normed, plain[1]) <= LIMIT[layer.dtype], kind


def raised(x: object) -> object:
    """x, and all that is in it, in float32."""
    if isinstance(x, Tensor):
        return x.float() if x.is_floating_point() else x
    if not isinstance(x, tuple):
        return x
    parts = [raised(part) for part in x]
    return tuple(parts) if type(x) is tuple else type(x)(*parts)


def exact(x: Tensor, scale: RowScale | None, routes: Routes, stack: Experts, shared: Shared | None) -> Tensor:
    """The reference, nothing rounded on the way."""
    return experts.reference(x.float(), scale, routes, raised(stack), raised(shared))


@pytest.mark.parametrize(("name", "num_tokens"), [*product(("gated", "gates and biases"), (1, 18))])
def test_experts_that_are_held_elsewhere_add_nothing(name: str, num_tokens: int) -> None:
    """Two halves of the experts make what all of them do together."""
    layer, top_k, first = LAYERS[name], 3, 4
    x, stack = draw(num_tokens, layer.dim, scale=0.5), layer.stack()
    routes, total = layer.routes(num_tokens, top_k), torch.zeros(num_tokens, layer.dim, device=DEVICE)
    for begin, end in ((0, first), (first, layer.count)):
        held = (routes.experts >= begin) & (routes.experts < end)
        own = Routes(torch.where(held, routes.experts - begin, end - begin), routes.weights)
        weights = [part if part is None else part[begin:end].clone() for part in stack[:4]]
        part = Experts(*weights, stack.act, stack.gated, total=layer.count)
        made = experts_triton(x, None, own, part, None)
        assert off(made, experts.reference(x, None, own, part, None)) <= 3e-6
        total += made
    assert off(total, experts.reference(x, None, routes, stack, None)) <= 3e-6


@pytest.mark.parametrize("rows", ROWS)
def test_a_token_does_not_depend_on_the_others(rows: int) -> None:
    """For fixed rows of a tile; and a second time gives the same bits."""
    layer, count = Layer(hidden=24, count=4, dtype=torch.bfloat16), 5 if rows == 1 else 20
    x, stack, routes = draw(count, layer.dim, dtype=layer.dtype), layer.stack(), layer.routes(count, 2)
    squares = RowScale(draw(count, 7, seed=8).square() + 1, 1e-6)
    whole = mix(x, squares, routes, stack, None, None, rows)[0]
    assert torch.equal(mix(x, squares, routes, stack, None, None, rows)[0], whole)
    for some in (slice(0, 1), slice(1, count - 2), slice(count - 1, count)):
        part = Routes(*(p[some] for p in routes))
        given = (x[some], RowScale(squares.squares[some], 1e-6), part, stack)
        assert torch.equal(mix(*given, None, None, rows)[0], whole[some])


@pytest.mark.parametrize("gated", [True, False])
def test_every_tile_computes_the_same(gated: bool) -> None:
    layer = Layer(dim=136, hidden=70, count=4, gated=gated, act="silu", bias=True)
    x, stack, routes = draw(3, layer.dim), layer.stack(), layer.routes(3, 2)
    want = exact(x, None, routes, stack, None)
    for up, down in (
        (Tile(32, 256, 1, 1, 4), Tile(64, 64, 1, 2, 4)),
        (Tile(16, 64, 1, 4, 4), Tile(32, 16, 1, 1, 1)),
    ):
        hidden = multiply_up(x, None, routes, stack, None, up)
        assert off(multiply_down_alone(hidden, routes, stack, None, None, down)[0], want) <= 3e-6
    for rows, tile in ((8, Tile(16, 64, 1, 3, 1)), (16, Tile(64, 32, 1, 2, 4)), (64, Tile(32, 16, 1, 2, 2))):
        arranged = arrange(routes, layer.count, rows)
        hidden = multiply_up(x, None, routes, stack, arranged, tile)
        parts = multiply_down(hidden, routes, stack, arranged, tile).view(3, 2, -1)
        assert off((parts * routes.weights[..., None]).sum(1), want) <= 3e-6


def test_no_tokens() -> None:
    layer, rule = LAYERS["gated"], Rule(2)
    routes = route_triton(torch.empty(0, layer.count, device=DEVICE), rule, None)
    assert routes.experts.shape == routes.weights.shape == (0, 2)
    assert experts_triton(draw(0, layer.dim), None, routes, layer.stack(), None).shape == (0, layer.dim)


def test_rows_of_a_tile_follow_from_an_experts_share() -> None:
    found = [rows_for(n, 8, 128) for n in (1, 2, 8, 64, 65, 256, 1024, 8192)]
    assert found == [1, 8, 8, 8, 16, 32, 128, 128]
    assert [rows_for(n, 2, 8) for n in (1, 8, 64, 8192)] == [1, 8, 32, 128]
    assert rows_for(8192, 2, 8, itemsize=4) == 32


def test_many_tokens() -> None:
    layer, rule = Layer(dim=32, hidden=16, count=4), Rule(2)
    routes = route_triton(draw(70, layer.count, seed=1), rule, None)
    x, stack = draw(70, layer.dim), layer.stack()
    assert off(experts_triton(x, None, routes, stack, None), exact(x, None, routes, stack, None)) <= 3e-6
