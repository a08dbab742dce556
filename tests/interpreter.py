"""Triton's kernels on the CPU, one numpy operation after another. Import it before kernels; see tests/conftest.py."""

import os
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_patch = interpreter._patch_lang_tensor
_cast_others = interpreter.InterpreterBuilder.cast_impl


def _patch_with_index(tensor: Any, scope: Any) -> None:
    """Triton 3.6 makes an index of an array of one number with int(), which NumPy refuses from 2.4 on."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _numbers(x: Any) -> Any:
    """What a handle holds; bfloat16 is kept as the upper half of float32."""
    return (x.data.astype(np.uint32) << 16).view(np.float32) if x.dtype.scalar is tl.bfloat16 else x.data


def _dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
    """BLAS adds up a row in an order that depends on where in the matrix it lies; no GPU does, and einsum does not."""
    product = np.einsum("ik,kj->ij", _numbers(a), _numbers(b), dtype=d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def _cast(self: Any, src: Any, dst_type: Any) -> Any:
    """To the nearest bfloat16, as GPUs do; Triton 3.6 rounds towards zero."""
    if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
        return _cast_others(self, src, dst_type)
    bits = np.ascontiguousarray(src.data).view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    numbers = np.where(np.isnan(src.data), 0x7FC0, nearest).astype(np.uint16)
    return interpreter.TensorHandle(numbers, tl.bfloat16)


interpreter._patch_lang_tensor = _patch_with_index
interpreter.InterpreterBuilder.create_dot = _dot
interpreter.InterpreterBuilder.cast_impl = _cast
