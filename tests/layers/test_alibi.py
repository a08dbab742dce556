"""Scores that fall with the distance: as precise as they should be, at any position, in any dtype."""

from pathlib import Path

import pytest
import torch

from quire import LLM
from quire.errors import ConfigError
from quire.layers.alibi import Slopes
from quire.models.common import alibi
from tests.engine.test_oracle import ENGINE
from tests.models.cases import BY_NAME, build_hf

OFF = {
    torch.float32: 1e-6,
    torch.float16: 1e-5,
    torch.bfloat16: 1e-4,
}  # relative to the distance's share of a score


@pytest.mark.parametrize("dtype", OFF)
@pytest.mark.parametrize("num_heads", [4, 12])
def test_scores_fall_by_the_slope(dtype: torch.dtype, num_heads: int) -> None:
    slopes, scale = alibi(num_heads), 64**-0.5
    made = Slopes(slopes, scale, dtype, torch.device("cpu"))
    positions = torch.tensor([0, 1, 63, 64, 4095, 4096, 65_535, 200_000])
    q = made.queries(torch.zeros(len(positions), num_heads, 64, dtype=dtype)).double()
    k = made.keys(torch.zeros(len(positions), 1, 64, dtype=dtype), positions).double()
    got = torch.einsum("ihd,jd->hij", q, k[:, 0]) * scale
    want = torch.tensor(slopes, dtype=torch.float64)[:, None, None] * positions
    assert (got - want).abs().le(OFF[dtype] * want).all()


def test_a_cache_of_int8_is_refused(tmp_path: Path) -> None:
    build_hf(BY_NAME["Bloom"], tmp_path)
    with pytest.raises(ConfigError, match="kv_cache_dtype is int8.*positions"):
        LLM(str(tmp_path), **ENGINE, kv_cache_dtype="int8")
