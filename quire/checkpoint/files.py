"""The files of a model folder: its JSON, its weight files and their headers. Reads no tensors."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from quire.errors import CheckpointError, ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NOT_OURS = (
    "consolidated",
    "adapter_model",
    "optimizer",
    "training_args",
)  # other formats of, or beside, a model
OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
MAX_JSON_BYTES = 256 * 2**20
MAX_HEADER_BYTES = 100 * 2**20  # the safetensors library's own limit


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ModelError: the file is missing, is not JSON (the message names line and column), or is no object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ModelError(f"{path} has {size} bytes; the limit for a JSON file is {MAX_JSON_BYTES}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist; is {path.parent} the folder of a model?") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ModelError(
            f"{path} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}"
        ) from None
    except UnicodeDecodeError as error:
        raise ModelError(
            f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#x}"
        ) from None
    except RecursionError:
        raise ModelError(f"{path} is nested too deeply to be a model's") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}; it must hold an object")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, which says what the network is."""
    return read_json(folder / "config.json")


def read_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json, the author's defaults for sampling and stopping; empty if there is none."""
    path = folder / "generation_config.json"
    return read_json(path) if path.exists() else {}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model, by its index if it has one.

    Raises:
        CheckpointError: there are none, some are missing, or the index names a file outside the folder.
    """
    index = folder / INDEX
    if index.exists():
        return _indexed(index)
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    files = sorted(f for f in folder.glob("*.safetensors") if not f.name.startswith(NOT_OURS))
    if not files:
        raise CheckpointError(_no_weights(folder))
    return files


def _no_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if name.endswith(OTHER_FORMATS) or name.startswith(NOT_OURS)]
    found = f" (it has {', '.join(others[:3])})" if others else ""
    return (
        f"{folder} has no *.safetensors of a whole model{found}. Quire reads nothing else, because loading "
        "older formats can run code: look for another revision or repository with model.safetensors, convert "
        "with transformers' save_pretrained, or pass --load-format dummy for random weights"
    )


def _indexed(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    names = {str(name) for name in weight_map.values()}
    for name in sorted(names):
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {name!r}; weight files must be *.safetensors beside it")
    files = [index.parent / name for name in sorted(names)]
    if missing := [f.name for f in files if not f.exists()]:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of {len(files)} weight files ({', '.join(missing[:3])}); "
            "the download is incomplete"
        )
    return files


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a file describes it."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> Mapping[str, Stored]:
    """What a safetensors file holds: 8 bytes of header length, a JSON header, then the data.

    Raises:
        CheckpointError: the file is truncated or damaged; the message names it and both sizes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if length < 2 or length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path} ({size} bytes) is no safetensors file: its header length is {length}"
            )
        raw = file.read(length)
    if len(raw) < length:
        raise CheckpointError(f"{path} is truncated: {size} bytes, but its header alone needs {8 + length}")
    try:
        header = json.loads(raw)
        entries = {name: value for name, value in header.items() if name != "__metadata__"}
        found = {name: Stored(str(v["dtype"]), tuple(v["shape"])) for name, v in entries.items()}
        spans = [tuple(value["data_offsets"]) for value in entries.values()]
        end = max((stop for _, stop in spans), default=0)
        sound = all(_is_span(span) for span in spans)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} ({size} bytes) has a damaged header: {type(error).__name__}") from None
    if not sound or any(not isinstance(n, int) or n < 0 for stored in found.values() for n in stored.shape):
        raise CheckpointError(f"{path} ({size} bytes) has a damaged header: a negative size")
    if size != 8 + length + end:
        what = "truncated" if size < 8 + length + end else "damaged"
        raise CheckpointError(f"{path} is {what}: {size} bytes, but its header describes {8 + length + end}")
    return found


def _is_span(span: tuple[Any, ...]) -> TypeGuard[tuple[int, int]]:
    return len(span) == 2 and all(isinstance(n, int) for n in span) and 0 <= span[0] <= span[1]
