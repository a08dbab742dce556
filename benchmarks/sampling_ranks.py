"""What ranks that have the logits of some tokens each take to draw a token for each row: milliseconds, best / median.

    python benchmarks/sampling_ranks.py [--size 151936] [--rows 1 8 32] [--rounds 20]

Two processes of one thread each, through shared memory. "Gathered": each gets all logits, and draws as if it were
alone. Rounds of both ways take turns, and rank 0's times count. Logits are random numbers of a spread of 3.
"""

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from quire.models.shard import vocabulary_share
from quire.parallel.factory import Rendezvous, communicators
from quire.parallel.mesh import Mesh
from quire.parallel.shared_memory import make_segment
from quire.parallel.vocabulary import Vocabulary
from quire.sampling.draw import Controls, draw
from quire.sampling.filters import Filters

WORLD = 2
KINDS = {
    "greedy": (0.0, 0.0, 0, 1.0),  # 1 / temperature, min_p, top_k, top_p
    "random": (1.0, 0.0, 0, 1.0),
    "top_k 20, top_p 0.8": (1.0, 0.0, 20, 0.8),
    "top_p 0.3": (1.0, 0.0, 0, 0.3),
    "top_p 0.95": (1.0, 0.0, 0, 0.95),  # of more tokens than ranks tell each other of
}


def controls(kind: str, rows: int, size: int) -> Controls:
    scale, min_p, top_k, top_p = KINDS[kind]
    filters = Filters(
        torch.full((rows,), math.log(min_p) if min_p else -math.inf),
        torch.full((rows,), top_k or size),
        torch.full((rows,), top_p),
    )
    seeds = torch.arange(rows)
    filtered = bool(min_p or top_k) or top_p < 1
    return Controls(torch.full((rows,), scale), filters, seeds, seeds, scale == 0, filtered)


def measure(rank: int, args: argparse.Namespace, segment: int) -> list[list[float]]:
    """Milliseconds of each round, gathered and not, of each kind and number of rows."""
    axis = communicators(Mesh(tp=WORLD), rank, Rendezvous(segment=segment), torch.device("cpu")).tp
    whole = Vocabulary(args.size)
    part = Vocabulary(args.size, vocabulary_share(args.size, WORLD), axis)
    found = []
    for rows in args.rows:
        chance = torch.Generator().manual_seed(rows)
        own = (torch.randn(rows, args.size, generator=chance) * 3)[:, part.own.start : part.own.stop].clone()
        for kind in KINDS:
            how = controls(kind, rows, args.size)

            def gathered(own: Tensor = own, how: Controls = how) -> Tensor:
                return draw(part.gather(own), how, whole)[0]

            def apart(own: Tensor = own, how: Controls = how) -> Tensor:
                return draw(own, how, part)[0]

            times: tuple[list[float], list[float]] = [], []
            for _ in range(args.rounds):
                for way, each in zip((gathered, apart), times, strict=True):
                    axis.barrier()
                    start = time.perf_counter()
                    way()
                    each.append((time.perf_counter() - start) * 1e3)
            assert torch.equal(gathered(), apart())
            found += times
    return found


def run(args: argparse.Namespace) -> list[list[float]]:
    """Fork the ranks; rank 0's figures."""
    segment = make_segment()
    with tempfile.TemporaryDirectory() as folder:
        pids = []
        for rank in range(WORLD):
            pids.append(os.fork())
            if not pids[-1]:
                status = 1
                try:
                    found = measure(rank, args, segment)
                    if rank == 0:
                        (Path(folder) / "found").write_text(json.dumps(found))
                    status = 0
                finally:
                    os._exit(status)
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
        if any(statuses):
            raise RuntimeError("a rank failed")
        found: list[list[float]] = json.loads((Path(folder) / "found").read_text())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=151_936, help="tokens of the vocabulary")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = iter(run(args))
    print("| rows | what | gathered | own tokens |\n|---|---|---|---|")
    for rows in args.rows:
        for kind in KINDS:
            cells = [f"{min(times):.2f} / {median(times):.2f}" for times in (next(found), next(found))]
            print(f"| {rows} | {kind} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
