"""Reading by our names: rows, shards, fused tensors, and what is said when something does not fit."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.checkpoint import reader
from quire.checkpoint.reader import Checkpoint
from quire.errors import CheckpointError
from quire.models.names import LLAMA, Names, Split
from tests.checkpoint.folders import matrix, save, save_shards, write_index

PLAIN = Names()
Q = "layers.0.mixer.q_proj.weight"


def test_rows_are_those_of_the_whole(tmp_path: Path) -> None:
    whole = matrix(6, 4)
    save(tmp_path, {"model.layers.0.self_attn.q_proj.weight": whole})
    checkpoint = Checkpoint(tmp_path, Names(renames=LLAMA))
    assert Q in checkpoint and "lm_head.weight" not in checkpoint
    assert torch.equal(checkpoint.tensor(Q, shape=(6, 4)), whole)
    assert torch.equal(checkpoint.tensor(Q, shape=(6, 4), rows=slice(2, 5)), whole[2:5])
    assert checkpoint.tensor(Q, shape=(6, 4), rows=slice(3, 3)).shape == (0, 4)


def test_rows_are_views_of_the_file(tmp_path: Path) -> None:
    save(tmp_path, {"a.weight": matrix(6, 4)})
    checkpoint = Checkpoint(tmp_path, PLAIN)
    whole = checkpoint.tensor("a.weight", shape=(6, 4))
    rows = checkpoint.tensor("a.weight", shape=(6, 4), rows=slice(2, 5))
    assert rows.data_ptr() - whole.data_ptr() == 2 * 4 * whole.element_size()


def test_scalars_and_dtypes_are_kept(tmp_path: Path) -> None:
    save(tmp_path, {"scale": torch.tensor(3.0), "half": torch.ones(2, dtype=torch.bfloat16)})
    checkpoint = Checkpoint(tmp_path, PLAIN)
    assert checkpoint.tensor("scale", shape=()).item() == 3.0
    assert checkpoint.tensor("half", shape=(2,)).dtype == torch.bfloat16


def test_shards(tmp_path: Path) -> None:
    save_shards(tmp_path, {"a": matrix(2, 3)}, {"b": matrix(4, 3, 100), "c": matrix(1, 1)})
    save(tmp_path, {"a": matrix(9, 9)}, "not-in-the-index.safetensors")
    checkpoint = Checkpoint(tmp_path, PLAIN)
    assert torch.equal(checkpoint.tensor("b", shape=(4, 3)), matrix(4, 3, 100))
    assert torch.equal(checkpoint.tensor("a", shape=(2, 3)), matrix(2, 3))
    assert checkpoint.unused() == ["c"]
    with pytest.raises(CheckpointError, match=r"1 tensors .* c \(c in model-00002-of-00002.safetensors\)"):
        checkpoint.finish()
    checkpoint.tensor("c", shape=(1, 1))
    checkpoint.finish()


def test_files_without_an_index(tmp_path: Path) -> None:
    save(tmp_path, {"a": matrix(2, 3)}, "part-1.safetensors")
    save(tmp_path, {"b": matrix(2, 3)}, "part-2.safetensors")
    save(tmp_path, {"a": matrix(2, 3)}, "consolidated.safetensors")
    save(tmp_path, {"lora": matrix(2, 3)}, "adapter_model.safetensors")
    assert Checkpoint(tmp_path, PLAIN).unused() == ["a", "b"]


parts = st.dictionaries(st.sampled_from("qkv"), st.integers(1, 4), min_size=1)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(parts, st.integers(1, 4), st.booleans(), st.data())
def test_fused_tensors(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: dict[str, int],
    groups: int,
    transposed: bool,
    data: st.DataObject,
) -> None:
    """Any cut of a tensor that was fused group by group gives back the parts, and any rows of them."""
    wholes = {part: matrix(rows * groups, 3, 1000 * i) for i, (part, rows) in enumerate(sizes.items())}
    fused = torch.cat([wholes[p][g * sizes[p] : (g + 1) * sizes[p]] for g in range(groups) for p in sizes])
    folder = tmp_path_factory.mktemp("fused")
    save(folder, {"l.qkv.weight": fused.t() if transposed else fused, "l.qkv.bias": fused[:, 0]})
    split = Split({part: len(whole) for part, whole in wholes.items()}, per_group=groups)
    names = Names(splits={"qkv": split}, transposed=("qkv",) if transposed else ())
    checkpoint = Checkpoint(folder, names)
    for part, whole in wholes.items():
        start = data.draw(st.integers(0, len(whole)))
        rows = slice(start, data.draw(st.integers(start, len(whole))))
        assert torch.equal(checkpoint.tensor(f"l.{part}.weight", shape=(len(whole), 3)), whole)
        assert torch.equal(
            checkpoint.tensor(f"l.{part}.weight", shape=(len(whole), 3), rows=rows), whole[rows]
        )
        bias = checkpoint.tensor(f"l.{part}.bias", shape=(len(whole),), rows=rows)
        assert torch.equal(bias, whole[rows, 0])
    checkpoint.finish()


@pytest.mark.parametrize("transposed", [False, True])
def test_stacks_of_fused_tensors(tmp_path: Path, transposed: bool) -> None:
    """Each item is a tensor of its own, cut and turned as one that is stored alone."""
    items = [matrix(5, 3, 100 * i) for i in range(4)]
    stack = torch.stack([item.t() if transposed else item for item in items])
    biases = torch.stack([item[:, 0] for item in items])
    save(tmp_path, {"l.experts.ud": stack.contiguous(), "l.experts.ud_bias": biases, "l.odd": matrix(1, 6)})
    names = Names(
        splits={"ud": Split({"u": 2, "d": 3})},
        transposed=("ud",) if transposed else (),
        stacked=(
            (r"\.experts\.ud$", ".experts.{}.ud.weight"),
            (r"\.experts\.ud_bias$", ".experts.{}.ud.bias"),
            (r"\.odd$", ".single"),
        ),
    )
    checkpoint = Checkpoint(tmp_path, names)
    for i, item in enumerate(items):
        assert torch.equal(checkpoint.tensor(f"l.experts.{i}.u.weight", shape=(2, 3)), item[:2])
        rows = checkpoint.tensor(f"l.experts.{i}.d.weight", shape=(3, 3), rows=slice(1, 3))
        assert torch.equal(rows, item[3:5])
        assert torch.equal(checkpoint.tensor(f"l.experts.{i}.d.bias", shape=(3,)), item[2:, 0])
        assert f"l.experts.{i}.u.bias" in checkpoint
    assert torch.equal(checkpoint.tensor("l.single", shape=(6,)), matrix(1, 6)[0])


def test_a_fused_tensor_of_the_wrong_size(tmp_path: Path) -> None:
    save(tmp_path, {"l.qkv.weight": matrix(5, 3)})
    names = Names(splits={"qkv": Split({"q": 2, "k": 2})})
    with pytest.raises(CheckpointError, match=r"l.qkv.weight has shape \(5, 3\); .* 4 rows \(q 2, k 2\)"):
        Checkpoint(tmp_path, names)


def test_a_missing_tensor_is_explained(tmp_path: Path) -> None:
    save(
        tmp_path, {f"model.layers.{i}.self_attn.{p}_proj.weight": matrix(1, 1) for i in (0, 1) for p in "qk"}
    )
    checkpoint = Checkpoint(tmp_path, Names(renames=LLAMA))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.tensor("layers.7.mixer.q_proj.weight", shape=(1, 1))
    message = str(caught.value)
    assert str(tmp_path) in message and "layers.7.mixer.q_proj.weight" in message
    assert "model.layers.7.self_attn.q_proj.weight" in message
    with pytest.raises(CheckpointError, match=r"closest: .*layers\.1\.mixer\.q_proj\.weight"):
        checkpoint.tensor("layers.1.mixer.q_prj.weight", shape=(1, 1))


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    save(tmp_path, {"a.weight": matrix(2, 3)})
    checkpoint = Checkpoint(tmp_path, PLAIN)
    with pytest.raises(CheckpointError, match=r"a.weight .* \(2, 3\); the config asks for \(3, 2\)"):
        checkpoint.tensor("a.weight", shape=(3, 2))
    assert checkpoint.unused() == ["a.weight"]


def test_a_tensor_found_twice(tmp_path: Path) -> None:
    save(tmp_path, {"a": matrix(1, 1)}, "one.safetensors")
    save(tmp_path, {"a": matrix(1, 1)}, "two.safetensors")
    with pytest.raises(CheckpointError, match=r"a is there twice, as a in one.* and as a in two"):
        Checkpoint(tmp_path, PLAIN)


def test_two_spellings_of_one_tensor(tmp_path: Path) -> None:
    save(tmp_path, {"model.norm.weight": matrix(1, 1), "norm.weight": matrix(1, 1)})
    with pytest.raises(CheckpointError, match=r"norm.weight is there twice"):
        Checkpoint(tmp_path, Names(renames=LLAMA))


def test_known_extras_are_ignored(tmp_path: Path) -> None:
    extras = (
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "transformer.h.0.attn.bias",
        "h.0.attn.masked_bias",
        "gpt_neox.layers.0.attention.bias",
        "gpt_neox.layers.0.attention.masked_bias",
        "lm_head.weight",
    )
    save(tmp_path, dict.fromkeys(extras, torch.ones(1)) | {"h.0.attn.c_attn.bias": torch.ones(2)})
    checkpoint = Checkpoint(tmp_path, Names(ignored=(r"^lm_head\.",)))
    assert checkpoint.unused() == ["h.0.attn.c_attn.bias"]


def test_check_lists_everything_that_does_not_fit(tmp_path: Path) -> None:
    save(tmp_path, {"a": matrix(2, 2), "b": matrix(2, 2), "c": matrix(2, 2)})
    checkpoint = Checkpoint(tmp_path, PLAIN)
    checkpoint.check({"a": (2, 2), "b": (2, 2), "c": (2, 2)}.items())
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check({"a": (2, 2), "b": (2, 3), **{f"x{i}": (1,) for i in range(7)}}.items())
    message = str(caught.value)
    assert "7 missing: x0, x1, x2, x3, x4 and 2 more" in message
    assert "1 not in the network: c" in message
    assert "1 of another shape: b is (2, 2) instead of (2, 3)" in message


def test_a_file_that_the_index_lacks(tmp_path: Path) -> None:
    save(tmp_path, {"a": matrix(1, 1)}, "one.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 weight files \(two.safetensors\)"):
        Checkpoint(tmp_path, PLAIN)


def test_a_tensor_that_the_shard_lacks(tmp_path: Path) -> None:
    save(tmp_path, {"a": matrix(1, 1)}, "one.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(CheckpointError, match=r"no tensor for b"):
        Checkpoint(tmp_path, PLAIN).tensor("b", shape=(1, 1))


def test_what_was_read_does_not_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file only what was read last is this process's."""
    monkeypatch.setattr(reader, "MAPPED_BYTES", 2 << 20)
    names = [f"weight{i}" for i in range(12)]
    save(tmp_path, {name: torch.full((512, 512), 2.0) for name in names})
    checkpoint = Checkpoint(tmp_path, PLAIN)
    most = 0
    for name in names:
        assert checkpoint.tensor(name, shape=(512, 512)).sum() == 2 * 512 * 512
        most = max(most, resident_kib(tmp_path))
    assert 1024 <= most <= 4 * 1024


def resident_kib(folder: Path) -> int:
    """Of mapped files of a folder."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if not head.endswith(":"):
            inside = str(folder) in line
        elif inside and head == "Rss:":
            found += int(line.split()[1])
    return found
