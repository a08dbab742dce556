"""Ranks that share out a sequence's tokens, a GPU each: the tokens of one GPU."""

from pathlib import Path

import pytest
import torch

from tests.engine.test_context import CASES
from tests.engine.test_ranks import few_blocks, make_engine, outputs
from tests.models.cases import build_hf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize(
    ("name", "size", "parts"),
    [("dense", 2, 2), ("experts", 2, 2), ("latent", 2, 2), ("two heads", 4, 2), ("latent", 4, 4)],
)
def test_tokens_are_those_of_one_gpu(name: str, size: int, parts: int, tmp_path: Path) -> None:
    """With prompts in pieces, preemption, a prefix that many share, and several sequences of a prompt."""
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    build_hf(CASES[name], tmp_path)
    alone = make_engine(tmp_path, device="cuda", block_size=16)
    want, _, _ = outputs(alone)
    # With one block more, of 16 tokens, the network with windows has room for one request alone.
    options = few_blocks(alone, 16, size, parts, spare=2 if name == "experts" else 1)
    alone.close()
    engine = make_engine(tmp_path, device="cuda", **options)
    try:
        got, num_preemptions, num_hits = outputs(engine)
        assert got == want
        assert num_preemptions > 0 and num_hits > 0
    finally:
        engine.close()
