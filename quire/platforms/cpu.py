"""The CPU: memory from the kernel and the control group, threads from torch."""

from pathlib import Path

import torch

from quire.platforms.base import Platform

UNLIMITED = 1 << 60  # version 1 control groups say "no limit" with a number about this large
GROUPS = (  # (limit, usage), versions 2 and 1
    ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
    ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


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


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such control group, or "max"
        return None


def detect() -> Platform:
    """This machine's CPU."""
    total, available = memory()
    fast_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return Platform(
        name="cpu",
        device=torch.device("cpu"),
        default_dtype=torch.bfloat16 if fast_bf16 else torch.float32,
        total_bytes=total,
        available_bytes=available,
        attention_order=("cpu", "reference"),
        num_threads=torch.get_num_threads(),
    )
