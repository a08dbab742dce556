"""Small checkpoints on disk, whole or damaged."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from quire.checkpoint.files import INDEX, SINGLE

Tensors = Mapping[str, torch.Tensor]


def matrix(rows: int, columns: int, start: int = 0) -> torch.Tensor:
    """Numbers that say where they are from."""
    return torch.arange(start, start + rows * columns, dtype=torch.float32).view(rows, columns)


def save(folder: Path, tensors: Tensors, name: str = SINGLE) -> Path:
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, folder / name)
    return folder / name


def save_shards(folder: Path, *shards: Tensors) -> None:
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save(folder, tensors, name)
        weight_map.update(dict.fromkeys(tensors, name))
    write_index(folder, weight_map)


def write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_header(path: Path, header: object, data: bytes = b"") -> None:
    """A safetensors file with any header at all."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
