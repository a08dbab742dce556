"""Damaged, missing and hostile files are named, with what is wrong and what to do."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from quire.checkpoint.files import (
    MAX_JSON_BYTES,
    Stored,
    read_config,
    read_generation_config,
    read_header,
    read_json,
    weight_files,
)
from quire.errors import CheckpointError, ModelError
from tests.checkpoint.folders import matrix, write_header, write_index
from tests.checkpoint.folders import save as save_to


def test_json_errors_name_file_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{\n  "a": 1,\n  "b" 2\n}')
    with pytest.raises(ModelError, match=r"config.json is not JSON: .* line 3, column 7"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[1, 2]", "holds a list"),
        (b"", "is not JSON"),
        (b'{"a": "\xff"}', "is not UTF-8: byte 7 is 0xff"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_json_that_is_no_object(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=words) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_json_has_a_size_limit(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(ModelError, match=str(MAX_JSON_BYTES)):
        read_json(path)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config.json does not exist; is .* the folder of a model"):
        read_config(tmp_path)
    with pytest.raises(ModelError, match="cannot be read: Is a directory"):
        read_json(tmp_path)


def test_generation_config_is_optional(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text('{"top_k": 20}')
    assert read_generation_config(tmp_path) == {"top_k": 20}


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"has no \*.safetensors of a whole model\. .*--load-format dummy"
    ):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "weights.gguf", "consolidated.safetensors"]
)
def test_other_formats_are_refused_with_advice(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"\(it has {name}\)\. .*run code.*save_pretrained"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "..",
        "x.bin",
        "",
    ],
)
def test_an_index_cannot_leave_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path / "secret.safetensors", folder / "sub" / "x.safetensors"):
        place.write_bytes(save({"a": torch.ones(1)}))
    write_index(folder, {"a": name})
    with pytest.raises(CheckpointError, match="must be \\*.safetensors beside it"):
        weight_files(folder)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_an_index_without_a_map(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="has no weight_map"):
        weight_files(tmp_path)


def test_headers_are_read(tmp_path: Path) -> None:
    path = save_to(tmp_path, {"a": matrix(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)})
    assert read_header(path) == {"a": Stored("F32", (2, 3)), "b": Stored("BF16", (4,))}


@pytest.mark.parametrize("kept", [0, 4, 8, 40, 200, -1])
def test_truncated_files(tmp_path: Path, kept: int) -> None:
    path = save_to(tmp_path, {"a": matrix(20, 30)})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"truncated|no safetensors file|damaged") as caught:
        read_header(path)
    assert str(path) in str(caught.value) and f"{path.stat().st_size} bytes" in str(caught.value)


GOOD = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "header",
    [
        b"not json at all",
        b"\xff\xfe\xff\xfe",
        ["a"],
        {"a": 3},
        {"a": GOOD | {"shape": None}},
        {"a": GOOD | {"shape": [-1]}},
        {"a": GOOD | {"shape": ["1"]}},
        {"a": GOOD | {"data_offsets": [0]}},
        {"a": GOOD | {"data_offsets": [4, 0]}},
        {"a": GOOD | {"data_offsets": ["0", "4"]}},
        {"a": GOOD | {"data_offsets": [0, 8]}},
        {"a": {"shape": [1]}},
    ],
)
def test_damaged_headers(tmp_path: Path, header: object) -> None:
    path = tmp_path / "model.safetensors"
    write_header(path, header, b"\0" * 4)
    with pytest.raises(CheckpointError, match=r"damaged|truncated"):
        read_header(path)


def test_a_git_lfs_pointer_is_no_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        read_header(path)


WHOLE = save({"a": matrix(3, 4), "b": matrix(1, 2)})


@settings(derandomize=True, deadline=None, max_examples=300)
@given(at=st.integers(0, len(WHOLE) - 1), byte=st.integers(0, 255))
def test_one_wrong_byte_never_escapes(tmp_path_factory: pytest.TempPathFactory, at: int, byte: int) -> None:
    path = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    path.write_bytes(WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :])
    try:
        assert len(read_header(path)) <= 2
    except CheckpointError as error:
        assert str(path) in str(error)
