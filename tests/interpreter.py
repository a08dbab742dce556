"""Triton's kernels on the CPU, one numpy operation after another. Import it before kernels; see tests/conftest.py."""

import os
from typing import Any

import triton.runtime.interpreter as interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_patch = interpreter._patch_lang_tensor


def _patch_with_index(tensor: Any, scope: Any) -> None:
    """Triton 3.6 makes an index of an array of one number with int(), which NumPy refuses from 2.4 on."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_with_index
