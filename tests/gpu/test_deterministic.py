"""With `deterministic`, what a request gets on a GPU is the same bits whatever happens around it."""

import dataclasses
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.config import Config
from quire.engine.engine import Engine
from quire.errors import ConfigError
from quire.kernels import ops
from quire.types import Logprob, OutputKind, SamplingParams
from tests.gpu.test_graphs import (
    KINDS,
    ODD,
    SCORED,
    Asked,
    Got,
    make_engine,
    run,
    without_fixed_steps,
    workload,
)
from tests.models.cases import BY_NAME, VOCAB_SIZE, build_hf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda")
COUNTS = (1, 2, 7, 16, 17, 33, 64, 65, 130, 511, 1000, 3000)
NETWORKS = {  # outputs, inputs: of both tiles, few parts and many, whole steps and not
    "qkv": (6144, 4096),
    "out": (4096, 4096),
    "down": (4096, 14336),
    "small": (1024, 2048),
    "partial": (1152, 4304),
    "odd": (333, 1001),
    "head": (32003, 1024),
}
Bits = dict[str, list[tuple[list[int], list[list[tuple[int, bytes, int | None]]]]]]


def bits(got: Got) -> Bits:
    """Tokens, and log probabilities as they are in memory, in their order."""

    def row(scores: dict[int, Logprob]) -> list[tuple[int, bytes, int | None]]:
        return [(token, struct.pack("d", s.logprob), s.rank) for token, s in scores.items()]

    return {
        key: [(tokens, [row(scores) for scores in logprobs]) for tokens, logprobs in outputs]
        for key, outputs in got.items()
    }


def alone(engine: Engine, asked: Asked) -> Bits:
    """Each request when there is no other."""
    found: Bits = {}
    for i, (prompt, params, _) in enumerate(asked):
        found[str(i)] = bits(run(engine, [(prompt, params, 0)]))["0"]
    return found


def scored(seed: int, count: int = 12) -> Asked:
    """Requests of all kinds that ask for log probabilities; every third shares the beginning of its prompt."""
    asked = workload(seed, [*KINDS, SCORED, *ODD], count=count, max_tokens=24)
    shared = [7 + i % 90 for i in range(150)]
    return [
        (shared[: 60 + 13 * i % 90] + prompt[:9] if i % 3 == 0 else prompt, replaced(params, i), step)
        for i, (prompt, params, step) in enumerate(asked)
    ]


def replaced(params: SamplingParams, i: int) -> SamplingParams:
    return dataclasses.replace(params, logprobs=i % 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_company_pieces_and_cached_prompts_change_no_bit(dtype: str) -> None:
    """In batches of any size, prompts in pieces of any size, with prefixes cached, in and out of graphs."""
    asked = scored(1)
    want = alone(make_engine(dtype, deterministic=True), asked)
    variants: list[dict[str, Any]] = [
        {},
        {"max_num_seqs": 3, "max_num_batched_tokens": 7},
        {"max_num_batched_tokens": 33, "enable_prefix_caching": True},
        {"max_num_batched_tokens": 257, "async_scheduling": False},
        {"enable_prefix_caching": True, "max_num_seqs": 5},
    ]
    for options in variants:
        engine = make_engine(dtype, deterministic=True, **options)
        for _ in range(2):  # graphs are captured in the first; the second finds prompts cached
            assert bits(run(engine, asked)) == want, options
    assert bits(run(without_fixed_steps(make_engine(dtype, deterministic=True)), asked)) == want


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_preemption_changes_no_bit(dtype: str) -> None:
    asked = workload(5, [SCORED], count=14, max_tokens=120)
    small: dict[str, Any] = {"deterministic": True, "block_size": 16}
    engine = make_engine(dtype, **small)
    block_bytes = engine.config.kv_cache_memory_bytes // engine.core.stats().num_blocks
    want = alone(engine, asked)
    for caching in (False, True):
        tight = make_engine(
            dtype, **small, kv_cache_memory_bytes=18 * block_bytes, enable_prefix_caching=caching
        )
        assert bits(run(tight, asked)) == want
        assert tight.core.stats().num_preemptions > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["Gemma2", "Qwen3Moe", "DeepseekV3", "GPT2"])
def test_other_networks(name: str, dtype: str, tmp_path: Path) -> None:
    """Windows and soft caps, experts, latent attention, layer norms."""
    build_hf(BY_NAME[name], tmp_path)
    prompts = [[3 + (5 * i + j * j) % (VOCAB_SIZE - 3) for j in range(1 + 7 * i % 40)] for i in range(9)]
    params = SamplingParams(
        temperature=0.0, logprobs=5, max_tokens=12, ignore_eos=True, output_kind=OutputKind.FINAL_ONLY
    )
    asked: Asked = [(prompt, params, i) for i, prompt in enumerate(prompts)]
    base: dict[str, Any] = {
        "model": str(tmp_path),
        "skip_tokenizer_init": True,
        "block_size": 16,
        "max_model_len": 64,
        "deterministic": True,
    }
    want = alone(make_engine(dtype, **base), asked)
    for batched in (20, 33, 2048):
        assert bits(run(make_engine(dtype, **base, max_num_batched_tokens=batched), asked)) == want, batched


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_row_of_a_product_is_the_same_among_any_number(name: str, dtype: torch.dtype) -> None:
    """Where parts of a tile have programs of their own and where they do not, also in a graph."""
    (outputs, inputs), generator = NETWORKS[name], torch.Generator(GPU).manual_seed(3)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=GPU) * scale).to(dtype)

    x, residual = draw(COUNTS[-1], inputs), draw(COUNTS[-1], outputs)
    plain = ops.pack_linear(draw(outputs, inputs, scale=inputs**-0.5), True)
    gated = ops.pack_linear(draw(2 * outputs, inputs, scale=inputs**-0.5), True)
    norm = ops.RmsNorm(draw(outputs), 1e-6)

    def results(some: slice) -> list[Tensor]:
        total, values, scale = ops.linear_add_norm(x[some], plain, None, residual[some], norm)
        assert scale is None
        product = ops.linear(x[some], plain, None, torch.float32)
        return [total, values, product, ops.normed_act_mul(x[some], None, gated, None, "silu")]

    whole = results(slice(None))
    want = x.double() @ plain.data.double().T
    assert float((whole[2] - want).norm() / want.norm()) < (2e-5 if dtype is torch.float32 else 1e-3)
    for count in COUNTS:
        for first in {0, (COUNTS[-1] - count) // 2, COUNTS[-1] - count}:
            for i, (got, all_rows) in enumerate(
                zip(results(slice(first, first + count)), whole, strict=True)
            ):
                assert torch.equal(got, all_rows[first : first + count]), (count, first, i)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(slice(5, 12))
    for _ in range(3):
        graph.replay()
    for got, all_rows in zip(captured, whole, strict=True):
        assert torch.equal(got, all_rows[5:12])
    assert not plain.arrivals.any() and not gated.arrivals.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_weight_per_head(dtype: torch.dtype) -> None:
    generator = torch.Generator(GPU).manual_seed(4)
    x = torch.randn(300, 16, 192, generator=generator, device=GPU).to(dtype)[:, :, :128]
    dense = (torch.randn(16, 512, 128, generator=generator, device=GPU) / 11).to(dtype)
    weight = ops.pack_linear(dense, True)
    whole = ops.linear(x, weight, None)
    want = torch.einsum("tbi,boi->tbo", x.double(), dense.double())
    assert float((whole.double() - want).norm() / want.norm()) < (1e-5 if dtype is torch.float32 else 3e-3)
    for some in (slice(0, 1), slice(3, 20), slice(100, 300)):
        assert torch.equal(ops.linear(x[some], weight, None), whole[some])


def test_what_cannot_be_deterministic_is_refused() -> None:
    with pytest.raises(ConfigError, match="attention_backend 'reference'.*deterministic"):
        make_engine("bfloat16", deterministic=True, attention_backend="reference")
    with pytest.raises(ConfigError, match="max_logprobs is -1"):
        make_engine("bfloat16", deterministic=True, max_logprobs=-1)
    engine = make_engine("bfloat16", deterministic=True)
    assert isinstance(engine.config, Config) and engine.config.deterministic
