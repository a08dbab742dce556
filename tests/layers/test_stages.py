"""Networks in stages: which layers each has, and that the last one's logits are those of one process."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quire.attention.reference import Reference
from quire.checkpoint.files import read_config
from quire.checkpoint.reader import Checkpoint
from quire.errors import ConfigError
from quire.layers.decoder import Decoder
from quire.models.parameters import parameter_shapes
from quire.models.registry import decoder_spec
from quire.models.spec import Decoder as Spec
from quire.models.stages import Stage, layers_of, stage_shapes, stages
from quire.parallel.axis import Axes, Axis
from tests.layers.test_chunks import LENGTHS, compute
from tests.layers.test_shards import NAMES, logits
from tests.models.cases import BY_NAME, build_hf, config_of, prompt
from tests.parallel.threads import in_ranks

NEAR = 1e-4


def spec_of(name: str) -> Spec:
    return decoder_spec(config_of(BY_NAME[name]))[0]


def num_layers(spec: Spec, size: int) -> list[int]:
    return [stage.end - stage.first for stage in stages(spec, size)]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_one(name: str, tmp_path: Path) -> None:
    """With streams, embeddings, states and whatever else layers hand on; each stage loads what it needs."""
    build_hf(BY_NAME[name], tmp_path)
    spec, names = decoder_spec(read_config(tmp_path))
    alone, size = logits(tmp_path), 3
    shapes = dict(parameter_shapes(spec))

    def stage(axis: Axis) -> tuple[list[torch.Tensor], set[str]]:
        decoder = Decoder(spec, backend=Reference(4), dtype=torch.float32, axes=Axes(pp=axis, world=axis))
        checkpoint = Checkpoint(tmp_path, names)
        decoder.load(checkpoint)
        loaded = shapes.keys() - set(checkpoint.unused())
        assert loaded == dict(stage_shapes(spec, decoder.stage)).keys()
        return compute(decoder, [prompt(n, seed=n) for n in LENGTHS], 1, 9), loaded

    found = in_ranks(size, stage)
    assert set().union(*(loaded for _, loaded in found)) == shapes.keys()
    for got, want in zip(found[-1][0], alone, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=NEAR * want.abs().max().item())


def test_stages_have_as_many_parameters_and_the_head_counts() -> None:
    spec = spec_of("Llama-3.1")
    blocks = spec.blocks[:1] * 10
    assert num_layers(replace(spec, blocks=blocks), 1) == [10]
    small = replace(spec, blocks=blocks, vocab_size=1)
    assert num_layers(small, 5) == [2] * 5 and sorted(num_layers(small, 4)) == [2, 2, 3, 3]
    assert num_layers(replace(small, vocab_size=2000), 4)[-1] == 1
    heavy = replace(blocks[0], mlp=replace(blocks[0].mlp, hidden=4096))
    assert num_layers(replace(small, blocks=(heavy, *blocks)), 2) == [1, 10]


def test_layers_that_read_each_others_keys_stay_together() -> None:
    spec = spec_of("Gemma3n")
    read = [block.mixer.shares for block in spec.blocks]
    last = stages(spec, 3)[-1]
    assert min(i for i in read if i is not None) >= last.first > 0
    part = layers_of(spec, last)
    assert [b.mixer.shares for b in part.blocks if b.mixer.shares is not None] == [
        i - last.first for i in read if i is not None
    ]
    with pytest.raises(ConfigError, match="pipeline_parallel_size is 4.* cut into 3 stages at most"):
        stages(spec, 4)


def test_layers_that_take_over_a_choice_stay_with_who_made_it() -> None:
    spec = spec_of("DeepseekV32")
    block = spec.blocks[1]
    taker = replace(block, mixer=replace(block.mixer, indexer=replace(block.mixer.indexer, own=False)))
    spec = replace(spec, blocks=(block, taker, block, taker, taker))
    assert stages(spec, 2) == (Stage(0, 2, 5), Stage(2, 5, 5))
    with pytest.raises(ConfigError, match="cut into 2 stages at most"):
        stages(spec, 3)
