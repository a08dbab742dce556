"""Networks that several ranks compute, each a part: the same logits as by one, the same bits on all ranks."""

from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quire.attention.reference import Reference
from quire.checkpoint.files import read_config
from quire.checkpoint.reader import Checkpoint
from quire.errors import ConfigError
from quire.layers.decoder import Decoder
from quire.layers.shards import Shards
from quire.models.parameters import num_parameters, parameter_shapes
from quire.models.registry import decoder_spec
from quire.models.shard import WholeExperts, check_parts, shard
from quire.models.spans import Spans
from quire.parallel.axis import Axes, Axis
from quire.parallel.mesh import Mesh
from tests.layers.test_chunks import LENGTHS, compute
from tests.models.cases import BY_NAME, build_hf, config_of, prompt
from tests.parallel.threads import in_mesh, in_ranks

NEAR = 1e-4
NAMES = (  # every way to share a layer out, and every mixer that cannot be
    *("Llama-3.1", "Llama-tied", "Qwen3", "Gemma2", "Falcon-7b", "GPT2", "OPT", "Mpt", "Cohere"),
    *(
        "Olmo2",
        "MiniMaxM2",
        "Gemma3n",
        "Gemma4",
        "PhiMoE",
        "GptOss",
    ),  # norms of all heads, sparse gates, biases
    *(
        "Mixtral",
        "Qwen2Moe",
        "Gemma4-experts",
        "DeepseekV3",
        "DeepseekV32",
        "Step3Text",
        "MiMoV2Flash",
        "Step3p5",
    ),
    *(
        "Qwen3Next",
        "KimiLinear",
        "Bamba",
        "NemotronH",
        "Zamba",
        "Zamba2",
        "FalconH1",
        "Mamba",
        "MiniMax",
        "BailingMoeLinearV2",
        "RecurrentGemma",
    ),
)


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    build_hf(BY_NAME[request.param], folder)
    return folder


def logits(folder: Path, axes: Axes | None = None, experts: WholeExperts | None = None) -> list[Tensor]:
    spec, names = decoder_spec(read_config(folder))
    decoder = Decoder(spec, backend=Reference(4), dtype=torch.float32, axes=axes, experts=experts)
    checkpoint = Checkpoint(folder, names)
    decoder.load(checkpoint)
    assert checkpoint.unused() == [] or experts
    return compute(decoder, [prompt(n, seed=n) for n in LENGTHS], 1, 9)


@pytest.mark.parametrize("size", [2, 4])
def test_logits_are_those_of_one(folder: Path, size: int) -> None:
    alone = logits(folder)
    ranks = in_ranks(size, lambda axis: logits(folder, Axes(tp=axis, world=axis)))
    for own in ranks:
        for got, want, first in zip(own, alone, ranks[0], strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=NEAR * want.abs().max().item())
            assert torch.equal(got, first)


def test_logits_where_ranks_with_the_same_keys_share_out_positions(folder: Path) -> None:
    alone, size, parts = logits(folder), 4, 2
    spec, _ = decoder_spec(read_config(folder))
    try:
        check_parts(spec, size, parts, 4, spec.max_length)
    except ConfigError as error:
        pytest.skip(str(error))
    for own in in_mesh(Mesh(tp=size // parts, cp=parts), lambda axes: logits(folder, axes)):
        for got, want in zip(own, alone, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=NEAR * want.abs().max().item())


def test_positions_that_see_later_ones_are_not_shared_out() -> None:
    spec, _ = decoder_spec(config_of(BY_NAME["Gemma"]))
    attention = replace(spec.blocks[0].mixer, spans=Spans(tokens=None))
    spanned = replace(spec, blocks=(replace(spec.blocks[0], mixer=attention), *spec.blocks[1:]))
    with pytest.raises(
        ConfigError, match="decode_context_parallel_size is 2, .* see later ones; leave it out"
    ):
        check_parts(spanned, 4, 2, 4, spec.max_length)


def test_a_part_is_about_as_small_as_its_share(tmp_path: Path) -> None:
    build_hf(BY_NAME["Llama-3.1"], tmp_path)
    spec, _ = decoder_spec(read_config(tmp_path))
    norms = sum(prod(shape) for name, shape in parameter_shapes(spec) if "norm" in name)
    whole, part = num_parameters(spec).total - norms, num_parameters(shard(spec, 2, 0)).total - norms
    assert whole / 2 <= part <= whole / 2 + 2 * spec.dim  # a row beyond the vocabulary


class Numbered:
    """Weights of which every number is different."""

    def __contains__(self, name: str) -> bool:
        return True

    def tensor(self, name: str, *, shape: tuple[int, ...], rows: slice | None = None) -> Tensor:
        whole = torch.arange(prod(shape)).view(shape)
        return whole if rows is None else whole[rows]


@pytest.mark.parametrize("name", ["Llama-3.1", "Bamba", "KimiLinear", "DeepseekV3", "Qwen3Next"])
def test_every_number_is_some_ranks(name: str, tmp_path: Path) -> None:
    build_hf(BY_NAME[name], tmp_path)
    whole, size = decoder_spec(read_config(tmp_path))[0], 2
    shapes, num_cut = dict(parameter_shapes(whole)), 0
    parts = [dict(parameter_shapes(shard(whole, size, rank))) for rank in range(size)]
    for param, shape in shapes.items():
        found = [
            Shards(Numbered(), whole, size, rank).tensor(param, shape=parts[rank][param])
            for rank in range(size)
        ]
        numbers = torch.cat([part.flatten() for part in found])
        assert set(range(prod(shape))) <= set(numbers.tolist()), param
        num_cut += found[0].numel() < prod(shape)
        some = Shards(Numbered(), whole, size, 1).tensor(param, shape=parts[1][param], rows=slice(0, 1))
        assert torch.equal(some, found[1][:1])
    assert num_cut > len(shapes) / 4


class Noted:
    """A checkpoint, and how many rows of each weight it was asked for."""

    def __init__(self, weights: Checkpoint):
        self.weights, self.rows = weights, Counter[str]()

    def __contains__(self, name: str) -> bool:
        return name in self.weights

    def tensor(self, name: str, *, shape: tuple[int, ...], rows: slice | None = None) -> Tensor:
        found = self.weights.tensor(name, shape=shape, rows=rows)
        self.rows[name] += len(found)
        return found


def rows_read(folder: Path, axis: Axis, experts: WholeExperts | None = None) -> Counter[str]:
    """How many rows of each weight a rank reads to load its part of the network."""
    spec, names = decoder_spec(read_config(folder))
    axes = Axes(tp=axis, ep=axis if experts else Axis(), world=axis)
    noted = Noted(Checkpoint(folder, names))
    Decoder(spec, backend=Reference(4), dtype=torch.float32, axes=axes, experts=experts).load(noted)
    return noted.rows


@pytest.mark.parametrize("name", ["Llama-3.1", "DeepseekV3", "Qwen3Next"])
def test_each_rank_reads_its_rows_only(name: str, tmp_path: Path) -> None:
    build_hf(BY_NAME[name], tmp_path)
    whole, size = decoder_spec(read_config(tmp_path))[0], 2
    num_rows = {param: shape[0] for param, shape in parameter_shapes(whole)}
    for rank, found in enumerate(in_ranks(size, lambda axis: rows_read(tmp_path, axis))):
        assert found == {param: shape[0] for param, shape in parameter_shapes(shard(whole, size, rank))}
        assert sum(found[param] < num for param, num in num_rows.items()) > len(num_rows) / 4


def test_what_cannot_be_shared_out_is_refused() -> None:
    spec, _ = decoder_spec(config_of(BY_NAME["Llama-3.1"]))
    with pytest.raises(ConfigError, match=r"tensor_parallel_size is 3.* 4 attention heads"):
        shard(spec, 3, 0)
    block = spec.blocks[0]
    odd = replace(block, mixer=replace(block.mixer, num_heads=12, num_kv_heads=6))
    with pytest.raises(ConfigError, match=r"is 4.* 6 heads of keys"):
        shard(replace(spec, blocks=(odd,)), 4, 0)
    odd = replace(block, mlp=replace(block.mlp, hidden=30))
    with pytest.raises(ConfigError, match=r"is 4.* 30 hidden numbers"):
        shard(replace(spec, blocks=(odd,)), 4, 0)
