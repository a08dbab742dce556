"""What GPUs exchange tensors by. On one GPU, NCCL has a single rank."""

import pytest
import torch

from tests.parallel.ranks import Ranks, expect

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("size", [1, 2])
def test_operations(size: int) -> None:
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    ranks = Ranks("tests.parallel.lives")
    try:
        expect(ranks.run("on_gpus", size), "well")
    finally:
        ranks.close()
