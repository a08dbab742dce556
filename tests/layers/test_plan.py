"""Transformers' modules that ranks share out by their authors' plans: the logits of one, and what cannot be had."""

import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from quire.attention.reference import Reference
from quire.checkpoint.reader import stored_tensors
from quire.errors import CheckpointError, ConfigError
from quire.layers.hf import plan
from quire.layers.hf.conformance import in_pieces
from quire.layers.hf.network import Modules
from quire.layers.hf.plan import Cut, Plan
from quire.layers.hf.source import describe, empty, hf_class, hf_config
from quire.parallel.axis import Axes, Axis
from tests.layers.test_hf import installed
from tests.models.cases import BY_NAME, Case, build_hf, config_of
from tests.models.values import BASE
from tests.parallel.threads import in_ranks

NEAR = 1e-4  # of the greatest logit
PROMPTS = [torch.arange(3, 3 + n) % 90 for n in (23, 5, 14)]  # as long as conformance has them
NAMES = (  # heads and columns; a tied head; windows; experts in one tensor and beside a shared one; latents; norms of
    # all heads, and fused weights, whose results are gathered; states; sinks; one that has no family
    *("Llama-3.1", "Llama-tied", "Gemma3", "Mixtral", "Qwen2Moe", "DeepseekV3", "Olmo2", "Phi3", "Qwen3Next"),
    *("MiMoV2Flash",),
)
UNCUT = re.compile(
    r"norm|gate\.weight|shared_expert|embed"
)  # what these plans leave whole, some in earlier versions
LOADING = threading.Lock()  # Transformers changes what all threads see while it does


def network(folder: Path, case: Case, axis: Axis) -> Modules:
    values = hf_config(config_of(case))
    with LOADING:
        spec = describe(case.described, values, alone=False, num_ranks=axis.size)
        found = Modules(spec, values, backend=Reference(4), dtype=torch.float32, axes=Axes(tp=axis))
        found.load(stored_tensors(folder))
    return found


def made(name: str) -> Any:
    """A network without weights."""
    return empty(BY_NAME[name].described, hf_config(config_of(BY_NAME[name])), alone=False)


def far(folder: Path, case: Case) -> float:
    """How far logits of two ranks are from those of one, in units of the greatest."""
    alone = in_pieces(network(folder, case, Axis()), PROMPTS)
    ranks = in_ranks(2, lambda axis: in_pieces(network(folder, case, axis), PROMPTS))
    largest = max(float(logits.abs().max()) for logits in alone)
    gaps = [float((a - b).abs().max()) for own in ranks for a, b in zip(own, alone, strict=True)]
    assert all(torch.equal(a, b) for own in ranks for a, b in zip(own, ranks[0], strict=True))
    return max(gaps) / largest


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_one(name: str, tmp_path: Path) -> None:
    build_hf(BY_NAME[name], tmp_path)
    assert far(tmp_path, BY_NAME[name]) < NEAR


CONTROLS = {  # a network whose plan has the word
    "colwise_gather_output": "Phi3",
    "embedding_rowwise": "Mixtral",
    "moe_tp_experts": "Mixtral",
    "rowwise": "Mixtral",
    "rowwise_split_input": "Phi3",
}


def test_every_exchange_has_a_control() -> None:
    assert {*plan.JOINS} == {*CONTROLS}


@pytest.mark.parametrize("style", CONTROLS)
def test_without_an_exchange_logits_differ(
    style: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = CONTROLS[style]
    if style not in Plan(made(name), 2, 0).styles.values():
        pytest.skip(f"Transformers {transformers.__version__} has no {style} for {name}")
    build_hf(BY_NAME[name], tmp_path)
    monkeypatch.delitem(plan.JOINS, style)
    try:
        assert not far(tmp_path, BY_NAME[name]) < 10 * NEAR
    except (AssertionError, ConfigError, RuntimeError, IndexError):
        return  # ranks differ, or shapes do not fit


class Counted:
    """A stored tensor that knows how many of its numbers were read."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.num_read = tensor, 0

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, item: Any) -> Tensor:
        found = self.tensor[item]
        self.num_read += found.numel()
        return found


@pytest.mark.parametrize("name", ["Llama-3.1", "Mixtral", "Gemma3"])
def test_ranks_read_their_parts_only(name: str, tmp_path: Path) -> None:
    build_hf(BY_NAME[name], tmp_path)
    model, size = made(name), 2
    stored = load_file(tmp_path / "model.safetensors")
    parts: dict[str, list[Tensor]] = {key: [] for key in stored}
    for rank in range(size):
        spied: Mapping[str, Counted] = {key: Counted(tensor) for key, tensor in stored.items()}
        for key, part in Plan(model, size, rank).parts(spied).items():
            assert spied[key].num_read == 0
            parts[key].append(part[...])
            assert spied[key].num_read == parts[key][-1].numel()
    cut = {key for key, found in parts.items() if found[0].numel() < stored[key].numel()}
    whole = [key for key in stored if key not in cut and not UNCUT.search(key)]
    assert {key.rpartition(".")[2] for key in whole} <= {"bias"}  # of sums
    for key in cut:
        numbers = torch.cat([part.flatten() for part in parts[key]]).sort().values
        assert torch.equal(numbers, stored[key].flatten().sort().values), key


@pytest.mark.parametrize("length", [7, 8])
def test_what_parts_of_unequal_length_lack_is_zeros(length: int) -> None:
    whole = torch.arange(1, 1 + length * 3).view(length, 3)
    found = [Cut(-2, length, 1, 3, rank).read(whole) for rank in range(3)]
    assert {part.shape for part in found} == {(3, 3)}
    rows = torch.cat(found)
    assert torch.equal(rows[:length], whole)
    assert not rows[length:].any()


def test_pieces_are_cut_each_by_itself() -> None:
    whole = torch.arange(16).view(1, 8, 2)
    first, second = (Cut(-2, 8, 2, 2, rank).read(whole) for rank in range(2))
    assert first[0, :, 0].tolist() == [0, 2, 8, 10]
    assert second[0, :, 0].tolist() == [4, 6, 12, 14]


def test_a_vocabulary_need_not_be_a_multiple(tmp_path: Path) -> None:
    odd = Case("Llama", BASE | {"vocab_size": 103})
    build_hf(odd, tmp_path)
    assert far(tmp_path, odd) < NEAR


def refused(name: str, size: int, **plan_of: str) -> str:
    model = made(name)
    model._tp_plan = {**model.tp_plan, **{key.replace("__", "."): style for key, style in plan_of.items()}}
    with pytest.raises(ConfigError, match=f"tensor_parallel_size is {size}") as error:
        Plan(model, size, 0)
    return str(error.value)


def test_what_cannot_be_followed_is_refused_by_name() -> None:
    assert "no plan" in refused("GPT2", 2)
    assert "sequence_parallel" in refused("Llama", 2, model__norm="sequence_parallel")
    assert "model.norm, a LlamaRMSNorm" in refused("Llama", 2, model__norm="colwise")
    assert "q_proj.weight has 64 rows or columns, which cannot be shared out evenly" in refused("Llama", 3)


def test_heads_that_are_fewer_than_ranks_are_refused() -> None:
    values = hf_config(config_of(BY_NAME["Llama"]) | {"num_key_value_heads": 2})
    with pytest.raises(ConfigError, match=r"tensor_parallel_size is 4.*a part of it does not run"):
        describe("LlamaForCausalLM", values, alone=False, num_ranks=4)


def test_layouts_whose_parts_are_not_known_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "ALIKE", {"MergeModulelist"})
    found = Plan(made("Mixtral"), 2, 0)
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    with pytest.raises(CheckpointError, match="Concatenate"):
        found.parts({name: torch.zeros(176, 128)})


def test_classes_keep_their_names() -> None:
    kind = hf_class(installed("LlamaForCausalLM"))
    part = Plan(made("Llama"), 2, 0).part_of(kind)
    assert (part.__name__, part.__module__) == (kind.__name__, kind.__module__)
