"""What a sum over the ranks of one machine takes, by the way they exchange tensors: microseconds, p50 / p99.

    python benchmarks/collectives.py [--worlds 2 4]

Ranks are forked processes of one thread each; all call as fast as they can, and rank 0's times count.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.distributed import FileStore

from quire.parallel.factory import Rendezvous, communicators
from quire.parallel.mesh import Mesh
from quire.parallel.shared_memory import make_segment, why_not

SIZES = [1 << power for power in (12, 14, 16, 18, 20)]  # bytes
NUM_CALLS = {1 << 12: 2000, 1 << 14: 2000, 1 << 16: 1000, 1 << 18: 300, 1 << 20: 100}
SLOWER = 10  # times fewer calls through gloo


def measure(way: str, rank: int, world: int, folder: str, segment: int) -> list[tuple[float, float]]:
    """(p50, p99) by size, after a tenth as many calls that do not count."""
    mesh = Mesh(tp=world)
    store = FileStore(f"{folder}/store", world) if way == "gloo" else None
    rendezvous = Rendezvous(store, segment=segment if way != "gloo" else None)
    axis = communicators(mesh, rank, rendezvous, torch.device("cpu")).tp
    found = []
    for size in SIZES:
        x, times = torch.zeros(size // 2, dtype=torch.bfloat16), []
        num_calls = NUM_CALLS[size] // (SLOWER if way == "gloo" else 1)
        for _ in range(num_calls + num_calls // 10):
            start = time.perf_counter()
            axis.all_reduce(x)
            times.append((time.perf_counter() - start) * 1e6)
        times = sorted(times[num_calls // 10 :])
        found.append((times[len(times) // 2], times[len(times) * 99 // 100]))
    return found


def run(way: str, world: int) -> list[tuple[float, float]]:
    """Fork the ranks; rank 0's figures."""
    segment = make_segment()
    with tempfile.TemporaryDirectory() as folder:
        pids = []
        for rank in range(world):
            pids.append(os.fork())
            if not pids[-1]:
                status = 1
                try:
                    found = measure(way, rank, world, folder, segment)
                    if rank == 0:
                        (Path(folder) / "found").write_text(json.dumps(found))
                    status = 0
                finally:
                    sys.stdout.flush()
                    os._exit(status)
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
        if any(statuses):
            raise RuntimeError(f"a rank of {world} failed through {way}")
        os.close(segment)
        return [(p50, p99) for p50, p99 in json.loads((Path(folder) / "found").read_text())]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", nargs="+", type=int, default=[2, 4])
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [f"{size >> 10} KB" if size < 1 << 20 else f"{size >> 20} MB" for size in SIZES]
    print(f"| ranks, way | {' | '.join(sizes)} |\n{'|---' * (len(sizes) + 1)}|", flush=True)
    for world in args.worlds:
        for way in ("shared memory", "gloo") if why_not(Mesh(tp=world)) is None else ("gloo",):
            cells = [f"{p50:,.0f} / {p99:,.0f}" for p50, p99 in run(way, world)]
            print(f"| {world}, {way} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
