"""What a user may call a model, and what is said when there is none. There is no network in tests."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from quire.checkpoint import source
from quire.checkpoint.source import Source, resolve
from quire.errors import ConfigError, ModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and a hub that cannot be reached."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def snapshot(cache: Path, files: dict[str, str], *, commit: str = COMMIT) -> Path:
    """A model in the hub's cache, as its client lays it out."""
    repository = cache / "models--acme--tiny"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return folder


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path)) == Source(str(tmp_path), tmp_path)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with the files of its models, empty ones."""
    for folder in ("demo", "demo/draft", "demo/eagle3"):
        (tmp_path / "quire" / folder).mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (tmp_path / "quire" / folder / name).write_text("")
    monkeypatch.setattr(source, "PACKAGE", tmp_path / "quire")
    return tmp_path / "quire"


@pytest.mark.parametrize(
    ("name", "folder"), [("demo", "demo"), ("demo-draft", "demo/draft"), ("demo-eagle3", "demo/eagle3")]
)
def test_models_that_come_with_quire(package: Path, cache: Path, name: str, folder: str) -> None:
    assert resolve(name) == Source(name, package / folder)
    with pytest.raises(ConfigError, match=f"revision is 'main'; {name} comes with Quire"):
        resolve(name, "main")


def test_our_name_wins_over_a_folder(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert resolve("demo").folder == package / "demo"
    assert resolve("./demo").folder.resolve() == tmp_path / "demo"
    assert resolve(str(tmp_path / "demo")).folder == tmp_path / "demo"


def test_a_package_without_its_model(package: Path, cache: Path) -> None:
    (package / "demo" / "model.safetensors").unlink()
    assert resolve("demo", weights=False).folder == package / "demo"
    with pytest.raises(ModelError, match=r"demo comes with Quire, but .*model\.safetensors is missing"):
        resolve("demo")
    (package / "demo" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"demo comes with Quire, but .*config\.json is missing"):
        resolve("demo", weights=False)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no config.json"):
        resolve(str(tmp_path))


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="is a file; pass the folder"):
        resolve(str(path))


@pytest.mark.parametrize(
    "name",
    ["./none", "/none/none", "../a/b", "a/b/c", "a/..", "https://x/y", "", "a b", "~none/x", "x" * 5000],
)
def test_names_that_cannot_be_repositories(cache: Path, name: str) -> None:
    with pytest.raises(
        ModelError, match="does not exist, and is no name of a Hugging Face repository|is no name of a model"
    ):
        resolve(name)


def test_an_unknown_name_offline(cache: Path) -> None:
    with pytest.raises(ModelError, match=r"acme/none is neither a folder nor in the cache.*HF_HUB_OFFLINE"):
        resolve("acme/none")


def test_a_cached_model_is_pinned_to_its_commit(cache: Path) -> None:
    folder = snapshot(cache, {"config.json": "{}", "model.safetensors": ""})
    assert resolve("acme/tiny") == Source("acme/tiny", folder, COMMIT)
    assert resolve("acme/tiny", COMMIT).revision == COMMIT
    assert resolve("acme/tiny", weights=False).folder == folder


def test_an_unknown_revision_offline(cache: Path) -> None:
    snapshot(cache, {"config.json": "{}"})
    with pytest.raises(ModelError, match="acme/tiny is neither"):
        resolve("acme/tiny", "v2")


def test_downloads_can_be_kept_elsewhere(cache: Path, tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "own", {"config.json": "{}", "model.safetensors": ""})
    assert resolve("acme/tiny", download_dir=str(tmp_path / "own")).folder == folder
    with pytest.raises(ModelError, match="cannot be reached"):
        resolve("acme/tiny")
