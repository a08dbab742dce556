"""Products of few rows at the sizes of real networks, and whole networks made of them, in and out of CUDA graphs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.attention.base import Backend, Turn, ragged, turn_and_write
from quire.attention.reference import Reference
from quire.attention.shapes import CacheShape, block_bytes
from quire.attention.triton.backend import Triton
from quire.kernels import ops
from quire.layers.decoder import Decoder
from quire.models import spec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU, CPU, BF16 = torch.device("cuda"), torch.device("cpu"), torch.bfloat16
STORED = {
    torch.bfloat16: 3e-3,
    torch.float16: 4e-4,
    torch.float32: 1e-5,
}  # of a result rounded once, relative
SUMMED = 1e-4  # of float32 sums over as many as 14,336 products, which tensor cores truncate
NETWORKS = {  # dim, hidden, outputs of q, k, v, inputs of the output, vocabulary
    "Llama 8B": (4096, 14336, 6144, 4096, 128256),
    "Qwen 0.5B": (896, 4864, 1152, 896, 151936),
    "Gemma 2B": (2304, 9216, 4096, 2048, 256000),
    "Llama 70B / 8": (8192, 3584, 1280, 1024, 16032),
    "odd": (1001, 333, 77, 130, 999),
}
ROWS = (1, 7, 31, 64)  # 16 share the tiles of 32
CASES = [(name, torch.bfloat16) for name in NETWORKS] + [
    ("Qwen 0.5B", torch.float16),
    ("Qwen 0.5B", torch.float32),
]


def draw(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(GPU).manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device=GPU) * scale).to(dtype)


def weight(outputs: int, inputs: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return draw(outputs, inputs, dtype=dtype, seed=seed, scale=inputs**-0.5)


def off(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@dataclasses.dataclass(frozen=True)
class Layer:
    """A dense layer's products; `run` is a decode step without attention."""

    qkv: Any
    out: Any
    up: Any
    down: Any
    norms: tuple[ops.RmsNorm, ops.RmsNorm]

    def run(self, x: Tensor, values: Tensor, scale: ops.RowScale | None) -> tuple[Tensor, Tensor, Any]:
        heads = ops.normed_linear(values, scale, self.qkv, None)
        inputs = (self.out if isinstance(self.out, Tensor) else self.out.data).shape[1]
        mixed = heads.repeat(1, -(-inputs // heads.shape[1]))[:, :inputs].contiguous()
        x, values, scale = ops.linear_add_norm(mixed, self.out, None, x, self.norms[0])
        hidden = ops.normed_act_mul(values, scale, self.up, None, "silu")
        return ops.linear_add_norm(hidden, self.down, None, x, self.norms[1])


def layer(name: str, dtype: torch.dtype, pack: Callable[[Tensor], Any], seed: int = 0) -> Layer:
    dim, hidden, qkv, out, _ = NETWORKS[name]
    shapes = ((qkv, dim), (dim, out), (2 * hidden, dim), (dim, hidden))
    weights = [pack(weight(*shape, BF16, seed + i).to(dtype)) for i, shape in enumerate(shapes)]
    gains = [draw(dim, dtype=BF16, seed=seed + 7 + i, scale=0.1).to(dtype) for i in range(2)]
    first, second = (ops.RmsNorm(gain, 1e-6, 1.0) for gain in gains)
    return Layer(*weights, (first, second))


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_products_equal_float32(name: str, dtype: torch.dtype) -> None:
    dim, hidden, qkv, _, _ = NETWORKS[name]
    up, down = weight(2 * hidden, dim, dtype), weight(dim, hidden, dtype, 2)
    plain, packed_up, packed_down = weight(qkv, dim, dtype, 3), ops.pack_linear(up), ops.pack_linear(down)
    packed, bias = ops.pack_linear(plain), draw(qkv, dtype=dtype, seed=4)
    gain = ops.RmsNorm(draw(dim, dtype=dtype, seed=5), 1e-6)
    for rows in ROWS:
        x, scale = (
            draw(rows, dim, dtype=dtype),
            ops.RowScale(draw(rows, 129, dtype=torch.float32).square(), 1e-6),
        )
        full = x.double() * torch.rsqrt(scale.squares.double().sum(1, keepdim=True) / dim + 1e-6)
        got = ops.linear(x, packed, bias, torch.float32)
        assert off(got, x.double() @ plain.double().T + bias.double()) <= SUMMED, rows
        got = ops.normed_linear(x, scale, packed, None)
        assert got.dtype == dtype and off(got, full @ plain.double().T) <= STORED[dtype], rows
        gates, ups = (full @ up.double().T).chunk(2, -1)
        got = ops.normed_act_mul(x, scale, packed_up, None, "silu")
        want = torch.nn.functional.silu(gates) * ups
        assert off(got, want) <= STORED[dtype], rows
        residual, hidden_x = (
            draw(rows, dim, dtype=torch.float32, seed=6),
            draw(rows, hidden, dtype=dtype, seed=7),
        )
        total, values, left = ops.linear_add_norm(hidden_x, packed_down, None, residual, gain)
        want = residual.double() + hidden_x.double() @ down.double().T
        assert total.dtype == torch.float32
        # Of float16 the product is rounded first, since its norm is made at once.
        assert off(total, want) <= (STORED[dtype] if dtype is torch.float16 else SUMMED), rows
        normed = want * torch.rsqrt(want.square().mean(1, keepdim=True) + 1e-6) * gain.weight.double()
        assert off(ops.finish_norm(values, left), normed) <= 2 * STORED[dtype], rows


@pytest.mark.parametrize("name", ["Llama 8B", "Qwen 0.5B"])
def test_logits_are_float32_at_any_number_of_rows(name: str) -> None:
    dim, *_, vocab = NETWORKS[name]
    head = weight(vocab, dim, torch.bfloat16)
    packed = ops.pack_linear(head)
    for rows in (1, 8, 64, 65, 200):
        x = draw(rows, dim, dtype=torch.bfloat16)
        got = ops.linear(x, packed, None, torch.float32)
        assert (
            got.dtype == torch.float32 and off(got[:, :4096], x.double() @ head[:4096].double().T) <= SUMMED
        )
        assert off(got[:, -99:], x.double() @ head[-99:].double().T) <= SUMMED


@pytest.mark.parametrize("rows", [1, 8, 16, 64])
@pytest.mark.parametrize("name", ["Llama 8B", "Qwen 0.5B"])
def test_the_same_bits_in_every_replay(name: str, rows: int) -> None:
    """Kernels that start while the one before them ends must not see what it has not written yet."""
    layers = [layer(name, torch.bfloat16, ops.pack_linear, seed) for seed in (0, 100, 200, 300)]
    x, norm = draw(rows, NETWORKS[name][0], dtype=torch.bfloat16), layers[0].norms[0]

    def run() -> tuple[Tensor, ...]:
        total, values, scale = x, ops.rms_norm(x, *norm), None
        found = []
        for one in layers:
            total, values, scale = one.run(total, values, scale)
            found += [total, values]
        return *found, ops.finish_norm(values, scale)

    first = [t.clone() for t in run()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for _ in range(30):
        for tensor in out:
            tensor.fill_(float("nan"))
        graph.replay()
        for got, want in zip(out, first, strict=True):
            assert torch.equal(got, want)
    plain = [layer(name, torch.float32, lambda w: w, seed) for seed in (0, 100, 200, 300)]
    total, values = x.float(), ops.rms_norm(x.float(), *(norm.weight.float(), norm.eps, norm.offset))
    for one in plain:
        total, values, _ = one.run(total, values, None)
    assert off(first[-1], values) <= 1e-2  # bfloat16 through four layers


@pytest.mark.parametrize("name", ["Llama 8B", "Qwen 0.5B"])
def test_a_row_does_not_depend_on_the_others(name: str) -> None:
    one = layer(name, torch.bfloat16, ops.pack_linear)
    x = draw(64, NETWORKS[name][0], dtype=torch.bfloat16)
    values = ops.rms_norm(x, *one.norms[0])
    for most, few in ((8, 3), (16, 10), (32, 20), (64, 50)):
        whole, part = (one.run(x[:n], values[:n], None) for n in (most, few))
        assert torch.equal(whole[0][:few], part[0]) and torch.equal(whole[1][:few], part[1])


def test_nothing_waits_for_the_device() -> None:
    one = layer("Qwen 0.5B", torch.bfloat16, ops.pack_linear)
    for mode in ("default", "error"):  # the first time they are compiled
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for rows in (1, 5, 64, 200):
                x = torch.ones(rows, 896, device=GPU, dtype=torch.bfloat16)
                one.run(x, x, None)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "half"),
    [(32, 8, 128, 64), (14, 2, 64, 32), (8, 4, 256, 128), (32, 32, 80, 16)],
)
def test_turning_and_storing_at_once(
    heads: int, kv_heads: int, dim: int, half: int, dtype: torch.dtype
) -> None:
    shape, backend = CacheShape(kv_heads, dim, dim), Triton(64)
    x = draw(300, heads + 2 * kv_heads, dim, dtype=dtype)
    angles = draw(512, half, dtype=torch.float32)
    step = ragged([40, 3], [299, 1], [[5, 2, 0, 7, 1, 3], [4]], 64, GPU)
    for norm in (None, draw(heads + kv_heads, dim, dtype=torch.float32, seed=3)):
        turn = Turn(angles.cos(), angles.sin(), norm is None, norm, 1e-6)
        pools = [
            torch.zeros(8, shape.num_bytes(64, dtype.itemsize), dtype=torch.uint8, device=GPU)
            for _ in range(2)
        ]
        caches = [backend.views(pool, 0, shape, dtype) for pool in pools]
        got = backend.place(caches[0], x.clone(), turn, step)
        want = turn_and_write(backend, caches[1], x.clone(), turn, step)
        pairs = ((got, want), *((getattr(caches[0], kind), getattr(caches[1], kind)) for kind in ("k", "v")))
        for mine, theirs in pairs:
            torch.testing.assert_close(
                mine.float(), theirs.float(), rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-5
            )


NORM, SHIFTED = spec.Norm(eps=1e-5), spec.Norm(eps=1e-6, offset=1.0)


def attention(**more: Any) -> spec.Attention:
    return spec.Attention(num_heads=4, num_kv_heads=2, head_dim=64, rope=spec.Rope(dim=64), **more)


def network(block: spec.Block, **more: Any) -> spec.Decoder:
    return spec.Decoder(
        vocab_size=1000, dim=256, max_length=512, blocks=(block,) * 3, norm=block.attn_norm or NORM, **more
    )


MLP = spec.MLP(hidden=704)
GELU = spec.MLP(hidden=704, act="gelu_pytorch_tanh")
POSTS: dict[str, Any] = {"attn_post_norm": SHIFTED, "mlp_post_norm": SHIFTED}
BLOCKS = {
    "Llama": spec.Block(mixer=attention(), mlp=MLP, attn_norm=NORM, mlp_norm=NORM),
    "Qwen2": spec.Block(mixer=attention(bias=True), mlp=MLP, attn_norm=NORM, mlp_norm=NORM),
    "Qwen3": spec.Block(mixer=attention(qk_norm=NORM), mlp=MLP, attn_norm=NORM, mlp_norm=NORM),
    "Gemma2": spec.Block(
        mixer=attention(softcap=50.0, window=40), mlp=GELU, attn_norm=SHIFTED, mlp_norm=SHIFTED, **POSTS
    ),
    "Gemma3": spec.Block(
        mixer=attention(qk_norm=SHIFTED), mlp=GELU, attn_norm=SHIFTED, mlp_norm=SHIFTED, **POSTS
    ),
    "Mixtral": spec.Block(
        mixer=attention(), mlp=spec.MoE(num_experts=4, top_k=2, expert=MLP), attn_norm=NORM, mlp_norm=NORM
    ),
    "parallel": spec.Block(mixer=attention(), mlp=MLP, attn_norm=NORM, mlp_norm=None, parallel=True),
}


class Random:
    """Weights by name, exact in bfloat16: the same wherever they are asked for."""

    def __contains__(self, name: str) -> bool:
        return True

    def tensor(self, name: str, *, shape: tuple[int, ...], rows: slice | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(sum(i * b for i, b in enumerate(name.encode())))
        values = torch.randn(shape, generator=generator)
        return (values * shape[1] ** -0.5 if len(shape) > 1 else 0.2 * values + 1).to(BF16)


def load(name: str, dtype: torch.dtype, backend: Backend, device: torch.device) -> Decoder:
    decoder = Decoder(network(BLOCKS[name]), backend=backend, dtype=dtype, device=device)
    decoder.load(Random())
    return decoder


def generate(decoder: Decoder, num_seqs: int, *, graph: bool = False) -> Tensor:
    """Logits of the prompts' ends and of three steps after them: prefill by cuBLAS, decodes by our kernels."""
    device, size = decoder.build.device, decoder.backend.block_size
    share = block_bytes(decoder.spec, size, decoder.build.dtype.itemsize)
    blocks = -(-64 // size)
    caches = decoder.caches(torch.zeros(num_seqs * blocks, share, dtype=torch.uint8, device=device))
    lengths = [20 + 3 * (s % 5) for s in range(num_seqs)]
    tables = [list(range(s * blocks, (s + 1) * blocks)) for s in range(num_seqs)]

    def step(starts: list[int], counts: list[int]) -> Tensor:
        ids = [
            (7 * s + 13 * p) % 1000
            for s, (a, n) in enumerate(zip(starts, counts, strict=True))
            for p in range(a, a + n)
        ]
        layout = ragged(starts, counts, tables, size, device)
        token_ids, last = torch.tensor(ids, device=device), layout.query_starts[1:].long() - 1
        run = lambda: decoder.logits(decoder(token_ids, layout, caches)[last])  # noqa: E731
        return replayed(run) if graph and max(counts) == 1 else run()

    prefill = step([0] * num_seqs, lengths)
    return torch.stack([prefill, *(step([n + i for n in lengths], [1] * num_seqs) for i in range(3))])


@torch.inference_mode()  # as the network's own results are, which may be changed nowhere else
def replayed(run: Callable[[], Tensor]) -> Tensor:
    """From a graph; a decode step can be repeated, since it writes the same keys again."""
    want = run().clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, want)
    return out


@pytest.mark.parametrize("num_seqs", [1, 5, 40])
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma2", "Gemma3"])
def test_bfloat16_networks_are_as_near_to_float32_as_plain_ones(name: str, num_seqs: int) -> None:
    """Dense ones: of experts, a rounding may choose another."""
    exact, plain = (
        generate(load(name, dtype, Reference(64), CPU), num_seqs) for dtype in (torch.float32, BF16)
    )
    ours = generate(load(name, BF16, Triton(64), GPU), num_seqs, graph=True).cpu()
    assert off(ours, exact) <= 1.3 * off(plain, exact) + 1e-3, (off(ours, exact), off(plain, exact))


@pytest.mark.parametrize("name", BLOCKS)
def test_float32_networks_equal_plain_ones(name: str) -> None:
    exact = generate(load(name, torch.float32, Reference(64), CPU), 5)
    assert off(generate(load(name, torch.float32, Triton(64), GPU), 5).cpu(), exact) <= 5e-5
