"""`quire bench kernels` where there is no GPU; what it measures is in tests/gpu."""

import pytest
import torch

from tests.cli.conftest import Quire


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("words", [[], ["--tune"], ["qwen3-0.6b", "--rows", "8"]])
def test_without_a_gpu_it_says_so(quire: Quire, words: list[str]) -> None:
    done = quire("bench", "kernels", *words)
    assert done.returncode == 2 and done.stdout == ""
    assert "pip install triton" in done.stderr or "no CUDA GPU" in done.stderr
