"""Damaged and unknown checkpoints are refused with a typed error that names the file and what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from quire import LLM
from quire.errors import CapacityError, CheckpointError, ConfigError, ModelError, QuireError, UnsupportedModel
from tests.engine.conftest import OPTIONS


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "copy"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def cut_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def garble_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 16 + path.read_bytes()[16:])


DAMAGE: dict[str, tuple[Callable[[Path], object], type[QuireError], str]] = {
    "no folder": (shutil.rmtree, ModelError, "copy"),
    "no config": (lambda f: (f / "config.json").unlink(), ModelError, "config.json"),
    "wrong json": (lambda f: (f / "config.json").write_text('{"a": 1,}'), ModelError, "config.json"),
    "no json object": (lambda f: (f / "config.json").write_text("[]"), ModelError, "config.json"),
    "unknown model": (
        lambda f: edit_config(f, architectures=["NoSuchForCausalLM"]),
        UnsupportedModel,
        "NoSuch",
    ),
    "draft head": (
        lambda f: edit_config(f, architectures=["LlamaForCausalLMEagle3"]),
        UnsupportedModel,
        "LlamaForCausalLMEagle3 is a draft head",
    ),
    "missing key": (lambda f: edit_config(f, num_attention_heads=None), ModelError, "num_attention_heads"),
    "unknown act": (lambda f: edit_config(f, hidden_act="swoosh"), UnsupportedModel, "swoosh"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ModelError, "safetensors"),
    "cut short": (cut_file, CheckpointError, "model.safetensors"),
    "bad header": (garble_header, CheckpointError, "model.safetensors"),
    "missing tensor": (
        lambda f: edit_weights(f, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        CheckpointError,
        r"layers\.1\.mlp\.up_proj",
    ),
    "extra tensor": (
        lambda f: edit_weights(f, lambda t: t.update(surprise=t["model.norm.weight"].clone())),
        CheckpointError,
        "surprise",
    ),
    "wrong shape": (
        lambda f: edit_weights(
            f, lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:-1].clone()})
        ),
        CheckpointError,
        "norm",
    ),
    "wrong tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), ModelError, "tokenizer.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(folder: Path, name: str) -> None:
    damage, error, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(error, match=message):
        LLM(str(folder), **OPTIONS)


def test_a_context_beyond_the_model_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="max_model_len is 100000"):
        LLM(str(folder), **OPTIONS, max_model_len=100_000)


def test_a_cache_too_small_for_one_request_is_refused(folder: Path) -> None:
    with pytest.raises(CapacityError, match="max_model_len"):
        LLM(str(folder), **OPTIONS, max_model_len=64, kv_cache_memory_bytes=10_000)


def test_a_model_that_is_not_there_says_where_it_looked() -> None:
    with pytest.raises(ModelError, match="no-such/model"):
        LLM("no-such/model", **OPTIONS)
