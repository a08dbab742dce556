"""The CPU: memory and cores from the kernel and the control group."""

import ctypes
import math
import os
import platform
from collections.abc import Sequence, Set
from pathlib import Path

import torch

from quire.kernels.cpu import native
from quire.log import logger
from quire.platforms.base import Platform

UNLIMITED = 1 << 60  # version 1 control groups say "no limit" with a number about this large
GROUPS = (  # (limit, usage), versions 2 and 1
    ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
    ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
NODES = Path("/sys/devices/system/node")


def memory(root: Path = Path("/")) -> tuple[int, int]:
    """(total, available) bytes that this process may use: the machine's, or its control group's if less."""
    lines = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
    info = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}
    total, available = info["MemTotal"], info["MemAvailable"]
    for limit_file, usage_file in GROUPS:
        limit, usage = (_number(root / name) for name in (limit_file, usage_file))
        if limit is not None and usage is not None and limit < UNLIMITED:
            total, available = min(total, limit), min(available, max(limit - usage, 0))
    return total, available


def cores(allowed: Set[int], root: Path = Path("/")) -> int:
    """Physical cores among the processors that this process may run on, or fewer if its control group has less time.

    Two threads of a core would share its arithmetic, and its part of the memory bandwidth.
    """
    topology = root / "sys/devices/system/cpu"
    found = set()
    for processor in allowed:
        try:
            found.add((topology / f"cpu{processor}/topology/thread_siblings_list").read_text())
        except OSError:  # nothing is known
            found.add(str(processor))
    return max(1, min(len(found), _most_time(root)))


def nodes(allowed: Set[int]) -> list[frozenset[int]]:
    """Which of these processors each memory node (NUMA) has that has any, in the order of their lowest."""
    lists = (path.read_text() for path in NODES.glob("node[0-9]*/cpulist"))
    found = (frozenset(allowed & _processors(text)) for text in lists)
    return sorted(filter(None, found), key=min) or [frozenset(allowed)]


def home(found: Sequence[Set[int]], index: int, count: int) -> Set[int]:
    """The memory node of one of this machine's `count` ranks; none if nodes cannot be shared out evenly among them.

    Nothing is gained by threads that stay on one processor each (docs/log.md). Where there are more nodes than ranks,
    weights lie on all of them, since all threads pack them.
    """
    told = "OMP_PROC_BIND" in os.environ or "OMP_PLACES" in os.environ or "GOMP_CPU_AFFINITY" in os.environ
    alike = len(found) > 1 and len({len(node) for node in found}) == 1 and count % len(found) == 0
    return found[index * len(found) // count] if alike and not told else frozenset()


def stay_on(processors: Set[int]) -> None:
    """This thread, and those with which it computes, run on no others from now on; memory comes from their node."""
    try:
        os.sched_setaffinity(0, processors)
    except OSError as error:
        logger.warning("threads do not stay on their memory node: %s", error)
        return
    library, _ = native.load()
    if library is not None:
        mask = sum(1 << processor for processor in processors)
        words = mask.to_bytes((max(processors) // 64 + 1) * 8, "little")
        library.quire_stay(words, ctypes.c_int64(len(words)), ctypes.c_int64(torch.get_num_threads()))


def return_memory() -> None:
    """Give the system what this process has freed: after loading, what lies between weights, a sixth of their size."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _most_time(root: Path) -> int:
    """Processors' worth of time that the control group has."""
    try:
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # no such control group, or "max"
        return len(os.sched_getaffinity(0))


def _processors(text: str) -> set[int]:
    """0-3,8 -> 0, 1, 2, 3, 8"""
    ends = [part.split("-") for part in text.strip().split(",") if part]
    return {number for part in ends for number in range(int(part[0]), int(part[-1]) + 1)}


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such control group, or "max"
        return None


def detect(index: int = 0, count: int = 1) -> Platform:
    """This machine's CPU, as one of `count` ranks has it."""
    total, available = memory()
    allowed = os.sched_getaffinity(0)
    found = nodes(allowed)
    told = "OMP_NUM_THREADS" in os.environ
    fast_bf16 = native.isa() > native.BASELINE or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return Platform(
        name="cpu",
        device=torch.device("cpu"),
        default_dtype=torch.bfloat16 if fast_bf16 else torch.float32,
        total_bytes=total,
        available_bytes=available,
        attention_order=("cpu", "reference"),
        num_threads=torch.get_num_threads() if told else cores(allowed),
        num_nodes=len(found),
        processors=home(found, index, count),
    )
