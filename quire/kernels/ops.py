"""The operations that layers call: references, with every kernel of this machine registered beside them."""

import importlib.util

import torch

from quire.kernels.cpu import mixture as _cpu_mixture  # noqa: F401  (importing it registers its kernels)
from quire.kernels.cpu import ops as _cpu  # noqa: F401
from quire.kernels.cpu import products as _cpu_products  # noqa: F401
from quire.kernels.cpu import recurrence as _cpu_recurrence  # noqa: F401
from quire.kernels.cpu import scan as _cpu_scan  # noqa: F401
from quire.kernels.experts import (
    Experts,
    Routes,
    Rule,
    Shared,
    experts,
    experts_add_norm,
    pack_experts,
    route,
    tensors_of,
)
from quire.kernels.quantized import quantize_linear
from quire.kernels.recurrent import causal_conv, recurrence, selective_scan, softplus
from quire.kernels.reference import (
    RmsNorm,
    RowScale,
    act,
    act_mul,
    act_mul_within,
    add,
    add_norm,
    as_table,
    embed,
    finish_norm,
    layer_norm,
    linear,
    linear_add_norm,
    norm_rope,
    normed_act_mul,
    normed_linear,
    pack_linear,
    pick,
    rms_norm,
)

# How torch was built says enough. To ask for a GPU would start CUDA, and no process may fork after that.
if torch.version.cuda is not None and importlib.util.find_spec("triton") is not None:
    from quire.kernels.triton import mixture as _mixture  # noqa: F401
    from quire.kernels.triton import ops as _triton  # noqa: F401
    from quire.kernels.triton import products as _products  # noqa: F401
    from quire.kernels.triton import states as _states  # noqa: F401


def why_not_invariant(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a row's products depend on the number of rows here; None if `pack_linear` knows a form whose do not."""
    if (device.type, dtype) in pack_linear.kernels:
        return None
    return (
        f"products of {str(dtype).removeprefix('torch.')} on {device.type} are torch's, which sum up a row in an order"
        " that depends on the others; use dtype bfloat16 or float32, with Quire's kernels built"
    )


__all__ = [
    "Experts",
    "RmsNorm",
    "Routes",
    "RowScale",
    "Rule",
    "Shared",
    "act",
    "act_mul",
    "act_mul_within",
    "add",
    "add_norm",
    "as_table",
    "causal_conv",
    "embed",
    "experts",
    "experts_add_norm",
    "finish_norm",
    "layer_norm",
    "linear",
    "linear_add_norm",
    "norm_rope",
    "normed_act_mul",
    "normed_linear",
    "pack_experts",
    "pack_linear",
    "pick",
    "quantize_linear",
    "recurrence",
    "rms_norm",
    "route",
    "selective_scan",
    "softplus",
    "tensors_of",
    "why_not_invariant",
]
