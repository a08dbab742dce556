"""What a machine does beside what is measured on it: its speed at the moment, and what other processes take.

Reads /proc, so Linux only. Knows no contestants. On shared hosts memory bandwidth comes and goes with neighbours that
nothing here shows, and one busy process beside two threads costs far more than its share; so both are looked at for
each sample.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

READ_BYTES = 2**28  # larger than the caches that a few threads share
SIZE = 1024
TRIES = 3
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
IDLE = (3, 4)  # columns of /proc/stat: idle, iowait; then irq, softirq, steal, which others cause
LOOK_S = 0.3
Times = dict[int, tuple[int, float]]


class Probe:
    """Memory bandwidth and arithmetic with a number of threads, in about a tenth of a second."""

    def __init__(self, threads: int):
        torch.set_num_threads(threads)
        self._buffer = torch.ones(READ_BYTES // 4)
        self._matrix = torch.randn(SIZE, SIZE)

    def __call__(self) -> tuple[float, float]:
        """(GB/s of a read, GFLOP/s of products in float32)."""
        read_s = best_s(lambda: torch.dot(self._buffer, self._buffer))
        multiply_s = best_s(lambda: self._matrix @ self._matrix)
        # A dot product of a buffer with itself reads it once: the second time it is in the nearest cache.
        return READ_BYTES / read_s / 1e9, 2 * SIZE**3 / multiply_s / 1e9


def best_s(run: Callable[[], object]) -> float:
    def once() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return min(once() for _ in range(TRIES))


class Meter:
    """Processors that others keep busy from now on.

    Not counted are this process, its children that have ended, and `pid` with all that descend from it. Contestants
    that wait for their turn are others, too: one that spins meanwhile disturbs.
    """

    def __init__(self, pid: int | None = None):
        self._pid = pid
        self._start = self._look()

    def others(self) -> float:
        """On average, in processors."""
        clock, busy, own = (now - then for now, then in zip(self._look(), self._start, strict=True))
        return max(0.0, busy - own) / max(clock, 1e-3)

    def _look(self) -> tuple[float, float, float]:
        here = os.times()
        own = here.user + here.system + here.children_user + here.children_system
        return time.perf_counter(), busy_s(), own + (0.0 if self._pid is None else family_s(self._pid))


def busy_s() -> float:
    """Time that processors spent on anything, or that a hypervisor took from them."""
    with Path("/proc/stat").open() as file:
        ticks = [int(word) for word in file.readline().split()[1:9]]
    return sum(t for i, t in enumerate(ticks) if i not in IDLE) / TICKS_PER_S


def family_s(pid: int) -> float:
    """Processor time of a process and all that descend from it, ended ones included."""
    times = all_times()
    family = {pid}
    while more := {child for child, (parent, _) in times.items() if parent in family} - family:
        family |= more
    return sum(times[member][1] for member in family if member in times)


def all_times() -> Times:
    """(Parent, processor time with that of ended children) of each process."""
    times: Times = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                # After the name, which is in parentheses and may hold anything.
                words = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            times[int(folder.name)] = int(words[1]), sum(map(int, words[11:15])) / TICKS_PER_S
    return times


def wait_quiet(most: float, patience_s: float) -> bool:
    """Until others keep fewer than `most` processors busy; False if that takes longer than `patience_s`."""
    end = time.perf_counter() + patience_s
    while time.perf_counter() < end:
        meter = Meter()
        time.sleep(LOOK_S)
        if meter.others() < most:
            return True
    return False
