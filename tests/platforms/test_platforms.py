"""What the machine offers."""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from quire.errors import ConfigError
from quire.kernels.cpu import native
from quire.platforms import cpu
from quire.platforms.cpu import cores, home, memory, nodes, return_memory, stay_on
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
    assert 1 <= platform.num_threads <= (os.cpu_count() or 1) and platform.num_nodes >= 1


def topology(root: Path) -> Path:
    """Two nodes of two cores of two threads."""
    for processor in range(8):
        name = f"sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list"
        machine(root, {name: f"{processor % 4},{processor % 4 + 4}\n"})
    return machine(
        root,
        {
            f"sys/devices/system/node/node{i}/cpulist": f"{2 * i}-{2 * i + 1},{2 * i + 4}-{2 * i + 5}\n"
            for i in range(2)
        },
    )


@pytest.mark.parametrize(
    ("allowed", "quota", "want"),
    [
        (range(8), "max 100000", (4, 2)),
        (range(4), "max 100000", (4, 2)),
        ((0, 4), "max 100000", (1, 1)),
        ((0, 1, 4), "max 100000", (2, 1)),
        (range(8), "250000 100000", (3, 2)),
        (range(8), "10000 100000", (1, 2)),
    ],
)
def test_threads_are_physical_cores_that_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: Sequence[int], quota: str, want: tuple[int, int]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(allowed))
    root = machine(topology(tmp_path), {"sys/fs/cgroup/cpu.max": quota + "\n"})
    monkeypatch.setattr(cpu, "NODES", root / "sys/devices/system/node")
    assert (cores(set(allowed), root), len(nodes(set(allowed)))) == want


def test_unknown_cores_are_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "NODES", tmp_path)
    assert cores({0}, tmp_path) == 1 and nodes({0}) == [{0}]


FIRST, SECOND = {0, 1, 4, 5}, {2, 3, 6, 7}
OF_OPENMP = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")


@pytest.mark.parametrize(
    ("allowed", "count", "want"),
    [
        (range(8), 1, [set()]),
        (range(8), 2, [FIRST, SECOND]),
        (range(8), 3, [set()] * 3),
        (range(8), 4, [FIRST, FIRST, SECOND, SECOND]),
        (range(4), 2, [{0, 1}, {2, 3}]),
        (range(3), 2, [set()] * 2),  # one node would have more to do
        ((0, 4), 2, [set()] * 2),
    ],
)
def test_ranks_are_at_home_on_memory_nodes_they_share_out_evenly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: Sequence[int], count: int, want: list[set[int]]
) -> None:
    monkeypatch.setattr(cpu, "NODES", topology(tmp_path) / "sys/devices/system/node")
    found = nodes(set(allowed))
    for name in OF_OPENMP:
        monkeypatch.delenv(name, raising=False)
    assert [home(found, i, count) for i in range(count)] == want


@pytest.mark.parametrize("name", OF_OPENMP)
def test_who_says_where_threads_run_is_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in OF_OPENMP:
        monkeypatch.delenv(other, raising=False)
    assert home([FIRST, SECOND], 1, 2) == SECOND
    monkeypatch.setenv(name, "0")
    assert not home([FIRST, SECOND], 1, 2)


@pytest.mark.skipif(native.load()[0] is None, reason="the C++ kernels are not built")
def test_all_threads_that_compute_stay() -> None:
    def staying(processor: int) -> int:
        tasks = [int(task.name) for task in Path("/proc/self/task").iterdir()]
        return sum(os.sched_getaffinity(task) == {processor} for task in tasks)

    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    if len(before) < 2:
        pytest.skip("needs two processors")
    try:
        torch.set_num_threads(2)
        one, other = sorted(before)[:2]
        stay_on({other})
        assert staying(one) == 0 and staying(other) == 2
        stay_on({one})
        assert staying(one) == 2 and staying(other) == 0
    finally:
        stay_on(before)
        torch.set_num_threads(threads)
    assert staying(one) == staying(other) == 0


def test_who_may_not_choose_processors_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    stay_on({1000})
    assert "threads do not stay" in caplog.text


def test_who_says_how_many_threads_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert detect("cpu").num_threads == torch.get_num_threads()


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cpu:0", "", "cuda:"])
def test_unknown_devices_are_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="must be auto, cpu, cuda or cuda:N"):
        detect(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    assert detect("auto").name == "cpu"
    with pytest.raises(ConfigError, match="--device cpu"):
        detect("cuda")


def test_a_cpu_with_vectors_computes_a_checkpoint_of_bfloat16_as_it_is() -> None:
    """Kernels that are built read half of what float32 takes, and compute as fast."""
    assert (detect("cpu").default_dtype is torch.bfloat16) >= (native.isa() > native.BASELINE)


def test_freed_memory_goes_back_to_the_system() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    count, size = 4096, 16384  # each too small for a mapping of its own
    pieces = [ctypes.create_string_buffer(size) for _ in range(count)]
    kept = pieces[::8]  # so that the heap cannot shrink by itself
    before = resident()
    del pieces
    return_memory()
    assert before - resident() > count * size // 2
    del kept
