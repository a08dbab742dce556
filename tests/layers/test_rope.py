"""Tables of rotary embeddings. That their values equal Hugging Face's is shown by test_decoder.py."""

import pytest
import torch

from quire.errors import UnsupportedModel
from quire.layers.rope import RopeTables, frequencies
from quire.models.spec import Rope

CPU = torch.device("cpu")
LONG = {
    "rope_type": "longrope",
    "short_factor": (1.0, 1.0),
    "long_factor": (2.0, 4.0),
    "original_max_position_embeddings": 16,
    "attention_factor": 1.5,
}


def test_a_rope_is_computed_once_and_equal_ropes_share_it() -> None:
    tables = RopeTables(32, CPU)
    scaled = {"rope_type": "linear", "factor": 2.0}
    cos, sin = tables.table(Rope(dim=8, scaling=scaled))
    assert cos.shape == sin.shape == (32, 4) and cos.dtype == torch.float32
    assert tables.table(Rope(dim=8, scaling=dict(scaled)))[0] is cos
    assert tables.table(Rope(dim=8))[0] is not cos


def test_positions_divided_by_the_factor() -> None:
    tables = RopeTables(32, CPU)
    plain, halved = (
        tables.table(Rope(dim=8, scaling=s))[1] for s in (None, {"rope_type": "linear", "factor": 2.0})
    )
    torch.testing.assert_close(halved[::2], plain[:16])


@pytest.mark.parametrize(("longest", "divisors"), [(16, (1.0, 1.0)), (17, (2.0, 4.0))])
def test_longropes_factors_follow_from_the_longest_sequence(
    longest: int, divisors: tuple[float, ...]
) -> None:
    inverse, gain = frequencies(Rope(dim=4, scaling=LONG), longest)
    plain, _ = frequencies(Rope(dim=4), longest)
    torch.testing.assert_close(inverse, plain / torch.tensor(divisors))
    assert gain == 1.5


def test_an_unknown_scaling_is_named() -> None:
    with pytest.raises(UnsupportedModel, match="'ntk'.*yarn"):
        frequencies(Rope(dim=4, scaling={"rope_type": "ntk"}), 8)
