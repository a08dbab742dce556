"""Whole experts that are spread over ranks: the same logits as by one, whichever way tokens get to them."""

from pathlib import Path

import pytest
import torch

from quire.attention.reference import Reference
from quire.checkpoint.files import read_config
from quire.errors import ConfigError
from quire.layers.base import Build, Spreading
from quire.layers.dispatch import FEW_ROWS, Dispatch
from quire.layers.rope import RopeTables
from quire.models.parameters import num_parameters, parameter_shapes
from quire.models.registry import decoder_spec
from quire.models.shard import WholeExperts, shard
from quire.parallel.axis import Axes, Axis
from tests.layers.test_shards import NEAR, logits, rows_read
from tests.models.cases import BY_NAME, build_hf, config_of
from tests.parallel.threads import Thread, Together, in_ranks

WAYS = ("allgather_reducescatter", "all_to_all")
NAMES = (  # every kind of router, and what experts have beside weights
    *("Mixtral", "Qwen2Moe", "DeepseekV3", "GptOss", "Llama4-plain", "Gemma4-experts", "PhiMoE", "NemotronH"),
)


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    build_hf(BY_NAME[request.param], folder)
    return folder


@pytest.mark.parametrize("size", [2, 4])
def test_logits_are_those_of_one(folder: Path, size: int) -> None:
    alone = logits(folder)
    for way in WAYS:
        experts = WholeExperts(size, way=way)
        ranks = in_ranks(size, lambda axis, e=experts: logits(folder, Axes(tp=axis, ep=axis, world=axis), e))
        for own in ranks:
            for got, want, first in zip(own, alone, ranks[0], strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=NEAR * want.abs().max().item())
                assert torch.equal(got, first)


def test_each_rank_reads_its_experts_only(tmp_path: Path) -> None:
    build_hf(BY_NAME["Mixtral"], tmp_path)
    spec, _ = decoder_spec(read_config(tmp_path))
    cut, whole = (shard(spec, 2, 0, experts) for experts in (None, WholeExperts(2)))
    assert num_parameters(whole).total == num_parameters(cut).total
    first, second = (
        {name for name in rows if ".experts." in name}
        for rows in in_ranks(2, lambda axis: rows_read(tmp_path, axis, WholeExperts(2)))
    )
    every = {name for name, _ in parameter_shapes(spec) if ".experts." in name}
    assert len(first) == len(second) and not first & second and first | second == every


def test_more_ranks_than_experts_are_refused() -> None:
    spec, _ = decoder_spec(config_of(BY_NAME["Mixtral"]))
    with pytest.raises(ConfigError, match=r"over 8 ranks.* layers of 4"):
        shard(spec, 1, 0, WholeExperts(8))


@pytest.mark.parametrize(
    ("num_groups", "num_ranks", "most_rows", "way", "invariant", "exchanges"),
    [
        (1, 4, 8192, "auto", False, False),  # all ranks have all tokens anyway
        (2, 1, FEW_ROWS, "auto", False, False),
        (2, 1, FEW_ROWS + 1, "auto", False, True),
        (2, 1, 8192, "auto", True, False),  # sums are to be the same bits in any company
        (2, 1, 8192, "allgather_reducescatter", False, False),
        (1, 4, 1, "all_to_all", False, True),
    ],
)
def test_tokens_take_the_way_that_suits_them(
    num_groups: int, num_ranks: int, most_rows: int, way: str, invariant: bool, exchanges: bool
) -> None:
    """Which follows from what all ranks know: a group may have no tokens, and computes with the others."""
    dp, tp, ep = (Axis(Thread(Together(n), 0)) for n in (num_groups, num_ranks, num_groups * num_ranks))
    spec = decoder_spec(config_of(BY_NAME["Mixtral"]))[0].blocks[0].mlp
    spreading = Spreading(Axes(dp=dp, tp=tp, ep=ep, world=ep), WholeExperts(ep.size, way=way), most_rows)
    build = Build(8, torch.float32, torch.device("cpu"), Reference(), RopeTables(1, "cpu"), invariant)
    for num_rows in (0, most_rows) if num_groups > 1 else (most_rows,):
        assert Dispatch(spec, build, spreading).exchanges(num_rows) is exchanges
