"""Prints what comes of every fault, at full size: `python -m tests.faults.table [ITEM ...]`."""

import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from tests.faults import crowds, scenarios
from tests.faults.client import streams
from tests.faults.injection import Fault
from tests.faults.scenarios import Report

HEAD = ["item", "what", "requests", "lost", "tokens wrong", "restarts", "recovery p50 / max", "note"]
Scenario = Callable[[Path], Awaitable[Report]]


def in_two(folder: Path) -> list[Path]:
    """Folders for two servers, one after the other."""
    folders = [folder / name for name in ("one", "other")]
    for each in folders:
        each.mkdir()
    return folders


def poison(fault: Fault, at: int, hang_s: float = 10.0) -> Scenario:
    return lambda folder: scenarios.poison(folder, fault, at, num_streams=64, stream=True, hang_s=hang_s)


FULL_SIZE: list[tuple[str, Scenario]] = [
    ("1", lambda folder: scenarios.killed(folder, bodies=streams(64, 200), num_kills=10)),
    ("1", lambda folder: scenarios.killed(folder, bodies=streams(64, 200), num_kills=10, seed=1)),
    ("1", lambda folder: scenarios.killed(folder, bodies=streams(64, 200), num_kills=10, seed=2)),
    ("3", lambda folder: scenarios.stopped(folder, num_streams=64, hang_s=10.0)),
    ("4", lambda folder: scenarios.cannot_be_sampled(folder, num_streams=64)),
    ("5", poison(Fault.EXITS, 0)),
    ("5", poison(Fault.ABORTS, 20)),
    ("5", poison(Fault.KILLED, 5)),
    ("5", poison(Fault.HANGS, 5, hang_s=1.0)),
    ("6", lambda folder: scenarios.not_a_number(folder, num_streams=64)),
    ("8", lambda folder: crowds.disconnects(folder, num_clients=1000)),
    ("9", lambda folder: crowds.never_reads(folder, num_clients=16, stall_s=5.0)),
    ("10", lambda folder: crowds.overloaded(folder, factor=10, seconds=60, wait_s=4, deadline_s=6)),
    ("11", lambda folder: crowds.drained(folder, num_streams=64)),
    ("11", lambda folder: crowds.second_signal(folder, num_streams=64)),
    ("12", lambda folder: crowds.frontend_killed(folder, num_streams=64)),
    ("17", lambda folder: scenarios.always_dies(folder, num_streams=64)),
    ("18", crowds.refused),
    ("18", lambda folder: crowds.wrong_clock(in_two(folder), num_streams=64)),
]


def row(report: Report) -> list[str]:
    times = sorted(report.recoveries_s)
    recovery = f"{times[len(times) // 2]:.2f} / {times[-1]:.2f} s" if times else ""
    counts = [report.num_requests, report.num_lost, report.num_wrong, report.num_restarts]
    return [report.item, report.what, *map(str, counts), recovery, report.note]


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


async def main(items: list[str]) -> int:
    """Returns the exit code: 1 if a promise was broken."""
    code = 0
    print(line(HEAD), line(["---"] * len(HEAD)), sep="\n", flush=True)
    for item, scenario in FULL_SIZE:
        if items and item not in items:
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(line(row(await scenario(Path(folder)))), flush=True)
            except AssertionError as error:
                code = 1
                print(line([item, f"BROKEN after {time.monotonic() - began:.0f} s: {error}"]), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
