"""From what a user calls a model to a folder on this machine. Reads no tensors, runs nothing it downloads."""

import re
from dataclasses import dataclass
from pathlib import Path

from quire.checkpoint.files import SINGLE
from quire.errors import ConfigError, ModelError

PACKAGE = Path(__file__).parent.parent
BUNDLED = {"demo": "demo", "demo-draft": "demo/draft", "demo-eagle3": "demo/eagle3"}  # folders of the package
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
SMALL = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "tokenizer*"]
LARGE = ["*.safetensors"]
NEVER = ["*/*.safetensors", "consolidated*", "*.bin", "*.pt", "*.pth", "*.py", "onnx/*", "original/*"]


@dataclass(frozen=True)
class Source:
    """A model on this machine. `revision` is the commit it was downloaded at; None if it was not."""

    name: str
    folder: Path
    revision: str | None = None


def resolve(
    model: str, revision: str | None = None, *, weights: bool = True, download_dir: str | None = None
) -> Source:
    """Find a model: one that comes with Quire, a folder, or a Hugging Face repository, which is downloaded if
    need be and pinned to a commit. `demo` is ours, `./demo` a folder.

    Args:
        revision: branch, tag or commit of a repository; not for folders.
        weights: whether to download weights or only the files that describe the model.
        download_dir: where downloads are kept; None for the hub's own cache.

    Raises:
        ConfigError: a model that comes with Quire was asked for in a revision.
        ModelError: there is no such model, or it cannot be reached.
    """
    if model in BUNDLED:
        return _bundled(model, revision, weights)
    try:
        folder = Path(model).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError) as error:  # an unknown ~user, a name too long
        raise ModelError(f"{model!r:.100} is no name of a model: {error}") from None
    if is_folder and model:
        if not (folder / "config.json").exists():
            raise ModelError(f"{folder} has no config.json; is it the folder of a model?")
        return Source(model, folder)
    if exists and model:
        raise ModelError(f"{folder} is a file; pass the folder that holds it and its config.json")
    if not REPOSITORY.fullmatch(model) or ".." in model:
        raise ModelError(
            f"{model!r} does not exist, and is no name of a Hugging Face repository (owner/name)"
        )
    return _download(model, revision, weights, download_dir)


def _bundled(model: str, revision: str | None, weights: bool) -> Source:
    if revision is not None:
        raise ConfigError(
            f"revision is {revision!r}; {model} comes with Quire and has only one, so leave revision out"
        )
    folder = PACKAGE / BUNDLED[model]
    for name in ("config.json", SINGLE) if weights else ("config.json",):
        if not (folder / name).is_file():
            raise ModelError(
                f"{model} comes with Quire, but {folder / name} is missing from this installation; install Quire again"
            )
    return Source(model, folder)


def _download(model: str, revision: str | None, weights: bool, download_dir: str | None) -> Source:
    """Imports the hub's client only here, because most starts do not need it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:  # from the cache if the hub cannot be reached or HF_HUB_OFFLINE is set
        folder = Path(
            snapshot_download(
                model, revision=revision, cache_dir=download_dir, allow_patterns=SMALL, ignore_patterns=NEVER
            )
        )
        commit = folder.name  # branches move between the two downloads
        if weights:
            snapshot_download(
                model, revision=commit, cache_dir=download_dir, allow_patterns=LARGE, ignore_patterns=NEVER
            )
    except GatedRepoError:
        advice = "accept its terms on its page of the hub and set HF_TOKEN"
        raise ModelError(f"{model} is gated: {advice}") from None
    except RevisionNotFoundError:
        raise ModelError(f"{model} has no revision {revision!r} on the Hugging Face hub") from None
    except RepositoryNotFoundError:
        advice = "a private one needs HF_TOKEN"
        raise ModelError(
            f"{model} is neither a folder nor a repository on the Hugging Face hub; {advice}"
        ) from None
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{model} is neither a folder nor in the cache, and the Hugging Face hub cannot be reached; "
            "download it where there is a network, and unset HF_HUB_OFFLINE if it is set"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(f"{model} cannot be downloaded: {error}") from error
    return Source(model, folder, commit)
