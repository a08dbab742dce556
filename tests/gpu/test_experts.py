"""Sparse experts at the sizes of real networks, and from CUDA graphs that hold for any routing."""

import pytest
import torch
from torch import Tensor

from quire.kernels import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU, BF16 = torch.device("cuda"), torch.bfloat16
LIMIT = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-4}  # relative, hidden and parts rounded
SIZES = {  # dim, hidden, experts, and how many a token goes to
    "Qwen3 30B-A3B": (2048, 768, 128, 8),
    "Mixtral": (4096, 14336, 8, 2),
    "DeepSeek-V3": (7168, 2048, 16, 8),  # fewer experts than it has
    "odd": (333, 77, 5, 3),
}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(GPU).manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device=GPU) * scale).to(dtype)


def off(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def stack_of(name: str, dtype: torch.dtype) -> ops.Experts:
    dim, hidden, count, _ = SIZES[name]
    up = draw(count, 2 * hidden, dim, dtype=dtype, seed=1, scale=dim**-0.5)
    down = draw(count, dim, hidden, dtype=dtype, seed=2, scale=hidden**-0.5)
    return ops.Experts(up, down, None, None, "silu", True)


def plain(x: Tensor, routes: ops.Routes, stack: ops.Experts) -> Tensor:
    """In float32, one expert's weights at a time."""
    y = torch.zeros(x.shape, device=GPU)
    for i in routes.experts.unique().tolist():
        rows, choice = (routes.experts == i).nonzero(as_tuple=True)
        gate, up = (x[rows].float() @ stack.up[i].float().T).chunk(2, -1)
        out = (torch.nn.functional.silu(gate) * up) @ stack.down[i].float().T
        y.index_add_(0, rows, out * routes.weights[rows, choice, None])
    return y


@pytest.mark.parametrize("dtype", list(LIMIT), ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_experts_equal_float32(name: str, dtype: torch.dtype) -> None:
    dim, _, count, top_k = SIZES[name]
    stack, norm = stack_of(name, dtype), ops.RmsNorm(draw(dim, dtype=dtype, seed=3), 1e-6)
    for tokens in (1, 2, 8, 64, 300, 2000):
        x, residual = draw(tokens, dim, dtype=dtype), draw(tokens, dim, seed=4)
        routes = ops.route(draw(tokens, count, seed=tokens), ops.Rule(top_k), None)
        want = plain(x, routes, stack)
        assert off(ops.experts(x, None, routes, stack, None), want) <= LIMIT[dtype], tokens
        total, values, scale = ops.experts_add_norm(x, None, routes, stack, None, residual, norm)
        assert off(total, want + residual) <= LIMIT[dtype], tokens
        normed = ops.rms_norm.reference(want + residual, norm.weight.float(), norm.eps)
        assert off(ops.finish_norm(values, scale), normed) <= 2 * LIMIT[dtype], tokens


@pytest.mark.parametrize("rule", [ops.Rule(8), ops.Rule(8, "sigmoid", True, 2.5, 8, 4)], ids=str)
def test_routes_equal_the_reference(rule: ops.Rule) -> None:
    logits, correction = draw(500, 256), draw(256, seed=1, scale=0.1)
    got, want = ops.route(logits, rule, correction), ops.route.reference(logits, rule, correction)
    same = (got.experts == want.experts).all(1)
    assert float(same.float().mean()) >= 0.99  # but for scores that a rounding orders otherwise
    torch.testing.assert_close(got.weights[same], want.weights[same], rtol=1e-4, atol=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [1, 8, 64, 100])
def test_a_graph_holds_for_any_routing(tokens: int) -> None:
    """Captured with one routing, replayed with others: the same bits as without a graph, each time."""
    dim, _, count, top_k = SIZES["Qwen3 30B-A3B"]
    stack, norm = stack_of("Qwen3 30B-A3B", BF16), ops.RmsNorm(draw(dim, dtype=BF16, seed=3), 1e-6)
    x, residual, logits = draw(tokens, dim, dtype=BF16), draw(tokens, dim), draw(tokens, count)

    def run() -> list[Tensor]:
        routes = ops.route(logits, ops.Rule(top_k), None)
        total, values, scale = ops.experts_add_norm(x, None, routes, stack, None, residual, norm)
        return [total, ops.finish_norm(values, scale)]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for seed in range(6):
        scores = draw(tokens, count, seed=seed)
        if seed == 5:  # all to the same
            scores = torch.arange(count, device=GPU).float().expand(tokens, count)
        logits.copy_(scores)
        want = [tensor.clone() for tensor in run()]
        for _ in range(5):
            graph.replay()
            for got, expected in zip(out, want, strict=True):
                assert torch.equal(got, expected)


def test_nothing_waits_for_the_device() -> None:
    dim, _, count, top_k = SIZES["Qwen3 30B-A3B"]
    stack = stack_of("Qwen3 30B-A3B", BF16)
    inputs = [(draw(n, dim, dtype=BF16), draw(n, count)) for n in (1, 8, 300)]
    for mode in ("default", "error"):  # the first time they are compiled
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for x, logits in inputs:
                ops.experts(x, None, ops.route(logits, ops.Rule(top_k), None), stack, None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
