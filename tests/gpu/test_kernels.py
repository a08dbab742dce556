"""Kernels for GPUs at the sizes of real networks; small and odd ones are in tests/kernels."""

import pytest
import torch

from quire.kernels import ops
from quire.kernels.dispatch import Op
from tests.kernels.test_kernels import INPUTS, Inputs, check, noise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),  # torch says it does not see all of them
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda")
OPS = (ops.rms_norm, ops.layer_norm, ops.add_norm, ops.norm_rope, ops.act, ops.act_mul)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def large(name: str, dtype: torch.dtype) -> Inputs:
    """Llama 8B, Qwen3, Gemma, and a batch of 8192 tokens."""
    if name in ("rms_norm", "layer_norm"):
        for rows, size in ((1, 4096), (256, 1024), (8192, 4096), (3, 16384), (2, 40000)):
            weight = noise(size, dtype=dtype, seed=1)
            bias = (None,) if name == "layer_norm" else ()
            yield noise(rows, size, dtype=dtype), weight, *bias, 1e-6
    elif name == "add_norm":
        for rows, size in ((1, 4096), (256, 1024), (8192, 4096), (3, 16384), (2, 40000)):
            x, residual = noise(rows, size, dtype=dtype), noise(rows, size, dtype=dtype, seed=2)
            norm = ops.RmsNorm(noise(size, dtype=dtype, seed=1), 1e-6)
            yield x, residual, norm
            yield x, residual.float(), norm, ops.RmsNorm(norm.weight, 1e-6, 1.0)
    elif name == "norm_rope":
        for tokens, heads, size, half in (
            (1, 40, 128, 64),
            (4096, 24, 128, 64),
            (300, 8, 256, 128),
            (7, 65, 64, 32),
        ):
            angles = noise(5000, half, seed=2)
            positions = torch.arange(tokens) + 11
            weight = noise(heads, size, seed=3)
            x = noise(tokens, heads + 8, size, dtype=dtype)[:, :heads]
            yield x, weight, 1e-6, angles.cos(), angles.sin(), positions, False
            yield x, None, 1e-6, angles.cos(), angles.sin(), positions, True
    else:
        for rows, size in ((1, 28672), (256, 6144), (1024, 28672)):
            yield noise(rows, size, dtype=dtype), "silu"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("o", OPS, ids=lambda o: o.name)
def test_kernel_equals_reference(o: Op, dtype: torch.dtype) -> None:
    kernel = o.kernels["cuda", dtype]
    check(o, kernel, large(o.name, dtype), dtype, GPU)
    check(o, kernel, INPUTS[o.name](dtype), dtype, GPU)


def test_nothing_waits_for_the_device() -> None:
    x, weight = torch.randn(64, 4096, device=GPU, dtype=torch.bfloat16), torch.ones(4096, device=GPU)
    qk, table = x.view(64, 32, 128), torch.ones(100, 64, device=GPU)
    positions = torch.arange(64, device=GPU)
    for mode in ("default", "error"):  # the first time they are compiled
        torch.cuda.set_sync_debug_mode(mode)
        try:
            ops.rms_norm(x, weight, 1e-6)
            ops.layer_norm(x, weight, None, 1e-6)
            ops.norm_rope(qk, None, 0.0, table, table, positions, False)
            ops.act_mul(x, "silu")
        finally:
            torch.cuda.set_sync_debug_mode("default")
