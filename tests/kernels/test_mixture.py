"""Sparse experts on CPUs: any routing on every instruction set, and the same bits for a token in any company."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.kernels import ops
from quire.kernels.cpu import native
from quire.kernels.cpu.mixture import PackedExperts, choose, mix
from quire.kernels.experts import Experts, Routes, Rule, Shared, experts, pack_experts, route
from quire.kernels.reference import RowScale
from tests.kernels.test_kernels import noise, plain

pytestmark = pytest.mark.skipif(native.load()[0] is None, reason="the C++ kernels are not built")
LEVELS = range(native.isa() + 1)
RULES = {
    "softmax": Rule(3),
    "not renormalised": Rule(2, renorm=False, scale=0.5),
    "one": Rule(1, renorm=False),
    "all": Rule(12),
    "chosen only": Rule(4, "softmax_topk"),
    "sigmoid": Rule(3, "sigmoid", scale=2.5),
    "groups": Rule(2, renorm=False, groups=4, top_groups=1),
    "groups of some": Rule(4, "sigmoid", scale=2.5, groups=4, top_groups=2),
    "odd groups": Rule(4, "sigmoid", groups=3, top_groups=2),
}
LIMIT = {torch.float32: 3e-6, torch.bfloat16: 8e-3}  # relative to all numbers


@dataclass(frozen=True)
class Layer:
    """Experts of some size and what surrounds them."""

    dim: int = 96
    hidden: int = 72
    count: int = 9
    gated: bool = True
    act: str = "silu"
    bias: bool = False
    dtype: torch.dtype = torch.float32
    bits: int = 0

    def draw(self, *shape: int, seed: int, scale: float = 1.0) -> Tensor:
        return noise(*shape, dtype=self.dtype, seed=seed, scale=scale)

    def pack(self, weight: Tensor) -> Any:
        return ops.quantize_linear(weight, self.bits) if self.bits else ops.pack_linear(weight)

    def stack(self, held: slice = slice(None)) -> Experts:
        ups = self.hidden << self.gated
        up = self.draw(self.count, ups, self.dim, seed=1, scale=self.dim**-0.5)
        down = self.draw(self.count, self.dim, self.hidden, seed=2, scale=self.hidden**-0.5)
        biases = (self.draw(self.count, ups, seed=3)[held], self.draw(self.count, self.dim, seed=4)[held])
        packed = [pack_experts(p[0], p[1:], len(p), self.pack) for p in (up[held], down[held])]
        return Experts(*packed, *(biases if self.bias else (None, None)), self.act, self.gated)

    def x(self, num_tokens: int) -> Tensor:
        return self.draw(num_tokens, self.dim, seed=0, scale=0.5)

    def routes(self, num_tokens: int, top_k: int = 3, kind: str = "any") -> Routes:
        """Of `kind` any, some (only the first experts), or one (all tokens to the same)."""
        scores = noise(num_tokens, self.count, seed=num_tokens)
        if kind != "any":
            scores[:, top_k:] = -100.0
        if kind == "one":
            scores[:] = torch.arange(self.count).float()
        return route.reference(scores, Rule(1 if kind == "one" else top_k), None)

    def shared(self, num_tokens: int, gate: bool) -> Shared:
        values = self.draw(num_tokens, 2 * self.dim, seed=5)[:, : self.dim]  # rows further apart
        return Shared(values, self.draw(num_tokens, 1, seed=6) if gate else None)


BF16 = torch.bfloat16
LAYERS = {
    "gated": Layer(),
    "odd": Layer(dim=33, hidden=21, count=5),
    "no gates, biases": Layer(gated=False, act="relu2", bias=True),
    "gates and biases": Layer(dim=130, hidden=70, act="gelu_pytorch_tanh", bias=True),
    "gates of their own": Layer(act="swiglu_oai", bias=True),
    "bfloat16": Layer(dtype=BF16),
    "bfloat16, odd": Layer(dim=33, hidden=21, bias=True, dtype=BF16),
    "int8": Layer(bits=8, bias=True),
    "int8 of bfloat16": Layer(dtype=BF16, bits=8),
    "int4": Layer(bits=4),
    "int4 of bfloat16": Layer(dim=160, hidden=70, dtype=BF16, bits=4, bias=True, gated=False),
}


def raised(x: Any) -> Any:
    """x, and all that is in it, in float32, with weights as the tensors that they were."""
    if isinstance(x, PackedExperts):
        return torch.stack([plain(weight).float() for weight in x.weights])
    if isinstance(x, Tensor):
        return x.float() if x.is_floating_point() else x
    if not isinstance(x, tuple):
        return x
    return type(x)(*map(raised, x))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_limits_of_gates_are_computed_expert_by_expert(dtype: torch.dtype) -> None:
    """No kernel of the whole has them; products are the kernels'."""
    layer, limit = Layer(dtype=dtype, bias=True), 0.1
    stack = layer.stack()._replace(limit=limit)
    x, routes = layer.x(17), layer.routes(17)
    got = ops.experts(x, None, routes, stack, None)
    up, down = raised(stack.up), raised(stack.down)
    want = torch.zeros(17, layer.dim)
    for token, (chosen, weights) in enumerate(zip(*routes, strict=True)):
        for i, weight in zip(chosen.tolist(), weights, strict=True):
            gate, other = (up[i] @ x[token].float() + stack.up_bias[i].float()).chunk(2)
            hidden = torch.nn.functional.silu(gate).clamp(max=limit) * other.clamp(-limit, limit)
            want[token] += weight * (down[i] @ hidden + stack.down_bias[i].float())
    assert off(got, want) < 4 * LIMIT[dtype]
    assert off(ops.experts(x, None, routes, stack._replace(limit=None), None), want) > 0.05


def off(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def mixed(
    x: Tensor, routes: Routes, stack: Experts, shared: Shared | None, level: int, threads: int
) -> Tensor:
    found = mix(x, routes, stack, shared, level, threads)
    assert found is not None
    return found


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", RULES)
def test_routes_equal_the_reference(name: str, level: int) -> None:
    rule = RULES[name]
    for num_tokens, count in ((1, 12), (9, 24), (40, 132)):
        logits = noise(num_tokens, 2 * count, seed=num_tokens)[:, :count]  # rows further apart
        for correction in (None, noise(count, seed=9)):
            got = choose(logits, rule, correction, level, 1)
            want = route.reference(logits, rule, correction)
            assert torch.equal(got.experts, want.experts) and got.experts.dtype == want.experts.dtype
            torch.testing.assert_close(got.weights, want.weights, rtol=3e-6, atol=1e-7)
            part = choose(logits[-1:], rule, correction, level, 2)
            assert torch.equal(part.weights, got.weights[-1:])


@pytest.mark.parametrize("level", LEVELS)
def test_ties_go_to_the_first_and_what_is_no_number_harms_its_token_only(level: int) -> None:
    logits = torch.zeros(3, 12)
    logits[1], logits[2, 7] = torch.nan, torch.nan
    for rule in (Rule(4), Rule(4, "sigmoid"), Rule(4, "softmax_topk"), RULES["groups of some"]):
        got = choose(logits, rule, torch.zeros(12), level, 1)
        assert got.experts[0].tolist() == [0, 1, 2, 3] and bool(got.weights[0].isfinite().all())
        for row in got.experts.tolist():
            assert len(set(row)) == 4 and all(0 <= e < 12 for e in row)
        assert not bool(got.weights[1].isfinite().any())
        assert not bool(got.weights[2].isfinite().all())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", LAYERS)
def test_experts_equal_the_reference(name: str, level: int) -> None:
    layer = LAYERS[name]
    stack = layer.stack()
    for num_tokens, kind in ((1, "any"), (2, "one"), (18, "any"), (40, "one"), (101, "some")):
        x, routes = layer.x(num_tokens), layer.routes(num_tokens, kind=kind)
        for shared in (None, layer.shared(num_tokens, False), layer.shared(num_tokens, True)):
            got = mixed(x, routes, stack, shared, level, 1)
            want = experts.reference(x, None, routes, stack, shared)  # of the same products, rounded as often
            assert got.dtype == want.dtype and off(got, want) <= LIMIT[layer.dtype] / 2, kind
            if not layer.bits:  # whose rows are rounded, too
                exact = experts.reference(x.float(), None, routes, raised(stack), raised(shared))
                assert off(got, exact) <= LIMIT[layer.dtype], kind


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_token_does_not_depend_on_the_others_nor_on_threads(name: str, level: int) -> None:
    layer, count = LAYERS[name], 70
    x, stack, routes, shared = layer.x(count), layer.stack(), layer.routes(count), layer.shared(count, True)
    whole = mixed(x, routes, stack, shared, level, 1)
    assert torch.equal(mixed(x, routes, stack, shared, level, 3), whole)
    for some in (slice(0, 1), slice(1, 3), slice(30, 47), slice(count - 1, count)):
        part, beside = Routes(*(p[some] for p in routes)), Shared(*(p[some] for p in shared))  # type: ignore[index]
        for threads in (1, 2):
            assert torch.equal(mixed(x[some], part, stack, beside, level, threads), whole[some])


@pytest.mark.parametrize("name", ["gated", "gates and biases", "int8", "int4"])
def test_experts_that_are_held_elsewhere_add_nothing(name: str) -> None:
    """Two halves of the experts make what all of them do together, and the shared one is added once."""
    layer, first = LAYERS[name], 4
    for num_tokens in (1, 21):
        x, stack, routes = layer.x(num_tokens), layer.stack(), layer.routes(num_tokens)
        shared, total = layer.shared(num_tokens, True), torch.zeros(num_tokens, layer.dim)
        for begin, end in ((0, first), (first, layer.count)):
            held = (routes.experts >= begin) & (routes.experts < end)
            own = Routes(torch.where(held, routes.experts - begin, end - begin), routes.weights)
            part = layer.stack(slice(begin, end))._replace(total=layer.count)
            total += experts(x, None, own, part, None if begin else shared)
        want = experts(x, None, routes, stack, shared)
        assert off(total, want) <= 2 * LIMIT[layer.dtype]


@pytest.mark.parametrize("bits", [0, 8])
def test_more_tokens_than_are_computed_at_once(bits: int) -> None:
    """Pairs of 64 MiB and more come in pieces, between which sums lie in memory."""
    layer, count, top_k = Layer(dim=32, hidden=32, count=12, bits=bits), 13_000, 8
    x, stack, routes = layer.x(count), layer.stack(), layer.routes(count, top_k)
    whole = ops.experts(x, None, routes, stack, None)
    assert off(whole, experts.reference(x, None, routes, stack, None)) <= LIMIT[layer.dtype]
    for some in (slice(0, 50), slice(7000, 7001), slice(count - 1, count)):
        part = Routes(*(p[some] for p in routes))
        assert torch.equal(ops.experts(x[some], None, part, stack, None), whole[some])


@pytest.mark.parametrize("name", ["odd", "bfloat16", "int8", "int4"])
def test_what_is_no_number_stays_its_tokens(name: str) -> None:
    layer = LAYERS[name]
    x, stack, routes = layer.x(9), layer.stack(), layer.routes(9)
    want = ops.experts(x, None, routes, stack, None)
    x[4, 7] = torch.nan
    got = ops.experts(x, None, routes, stack, None)
    others = [i for i in range(9) if i != 4]
    assert not got[4].isfinite().any() and torch.equal(got[others], want[others])


def test_what_comes_before_and_after() -> None:
    """A norm's rows that are still to be scaled, no tokens, and the sum with a norm."""
    layer = LAYERS["bfloat16"]
    x, stack, routes = layer.x(5), layer.stack(), layer.routes(5)
    scale = RowScale(noise(5, 7, seed=8).square() + 1, 1e-6)
    scaled = ops.finish_norm(x, scale)
    want = ops.experts(scaled, None, routes, stack, None)
    assert torch.equal(ops.experts(x, scale, routes, stack, None), want)
    nobody = ops.route(torch.empty(0, layer.count), Rule(2), None)
    assert nobody.experts.shape == nobody.weights.shape == (0, 2)
    assert ops.experts(layer.x(0), None, nobody, stack, None).shape == (0, layer.dim)
    residual, norm = layer.draw(5, layer.dim, seed=10), ops.RmsNorm(None, 1e-6)
    total, values, left = ops.experts_add_norm(scaled, None, routes, stack, None, residual, norm)
    assert torch.equal(total, residual + want) and left is None
    assert torch.equal(values, ops.rms_norm(total, None, 1e-6))


def test_weights_that_are_not_packed_are_the_references() -> None:
    layer = LAYERS["gated"]
    x, stack, routes = layer.x(5), layer.stack(), layer.routes(5)
    unpacked = stack._replace(up=tuple(stack.up), down=tuple(stack.down))
    assert mix(x, routes, unpacked, None, 0, 1) is None
    assert (
        off(ops.experts(x, None, routes, unpacked, None), ops.experts(x, None, routes, stack, None)) <= 1e-6
    )
