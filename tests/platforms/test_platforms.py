"""What the machine offers."""

from pathlib import Path

import pytest
import torch

from quire.errors import ConfigError
from quire.platforms.cpu import memory
from quire.platforms.detect import detect

GIB = 2**30


def machine(root: Path, files: dict[str, str]) -> Path:
    meminfo = "MemTotal:       16777216 kB\nMemFree:         1 kB\nMemAvailable:    8388608 kB\n"
    for name, text in {"proc/meminfo": meminfo, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({}, (16 * GIB, 8 * GIB)),
        ({"memory.max": "max\n", "memory.current": "5\n"}, (16 * GIB, 8 * GIB)),
        ({"memory.max": f"{4 * GIB}\n", "memory.current": f"{GIB}\n"}, (4 * GIB, 3 * GIB)),
        ({"memory.max": f"{12 * GIB}\n", "memory.current": f"{GIB}\n"}, (12 * GIB, 8 * GIB)),
        ({"memory.max": f"{GIB}\n", "memory.current": f"{2 * GIB}\n"}, (GIB, 0)),
        (
            {"memory/memory.limit_in_bytes": f"{2**63 - 4096}", "memory/memory.usage_in_bytes": "1"},
            (16 * GIB, 8 * GIB),
        ),
        (
            {"memory/memory.limit_in_bytes": f"{2 * GIB}", "memory/memory.usage_in_bytes": f"{GIB}"},
            (2 * GIB, GIB),
        ),
    ],
)
def test_memory_is_the_machines_or_its_groups(
    tmp_path: Path, files: dict[str, str], want: tuple[int, int]
) -> None:
    assert memory(machine(tmp_path, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})) == want


def test_this_cpu() -> None:
    platform = detect("cpu")
    assert platform.name == "cpu" and platform.device == torch.device("cpu")
    assert 0 < platform.available_bytes <= platform.total_bytes
    assert platform.attention_order[-1] == "reference"
    assert platform.num_threads == torch.get_num_threads()


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cpu:0", "", "cuda:"])
def test_unknown_devices_are_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="must be auto, cpu, cuda or cuda:N"):
        detect(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    assert detect("auto").name == "cpu"
    with pytest.raises(ConfigError, match="--device cpu"):
        detect("cuda")
