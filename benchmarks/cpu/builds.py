"""Products by several builds of the C++ kernels in one process, in turn, so that all meet the same noise.

    python setup.py build_ext --inplace && cp quire/kernels/cpu/quire_cpu*.so BEFORE.so  # at an earlier commit
    python benchmarks/cpu/builds.py BEFORE.so [--threads 2 --rows 1 8 --kinds int8 int4 --huge-pages]

Weights are those of Qwen3 0.6B's layers, packed once, more than caches hold; each is multiplied alone, nothing fused.
Calls are recorded and replayed, as the engine does it. A build's figures are medians; "times as fast" is as the build
that is installed here, by the median over rounds.
"""

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.cpu.kernels import names, pack  # noqa: E402
from quire.kernels import ops  # noqa: E402
from quire.kernels.cpu.calls import Kernel, Memory, Step, record  # noqa: E402
from quire.kernels.cpu.native import ABI, load  # noqa: E402

SHAPES = ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072))  # outputs, inputs
NUM_LAYERS = 28
KINDS = ("bfloat16", "int8", "int4")
HUGE_PAGE, MADV_COLLAPSE = 2 << 20, 25  # bytes; linux/mman.h

Run = Callable[[], object]


def collapse(data: torch.Tensor) -> None:
    """Have the system copy what it can of a weight to huge pages."""
    start = -(-data.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    size = (data.data_ptr() + data.nbytes - start) // HUGE_PAGE * HUGE_PAGE
    if size > 0 and ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_COLLAPSE):
        raise SystemExit("this system has no huge pages, or none is free; leave out --huge-pages")


def replayed(library: ctypes.CDLL, step: Step) -> Run:
    """All calls of a step, made by a library."""
    named, other = names(), Step({})
    other.calls = [(Kernel(library, named[address]).address, args) for address, args in step.calls]
    return other.replay


def compare(runs: Sequence[Run], num_rounds: int) -> list[list[float]]:
    """Seconds of each run in each round."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    for number in range(num_rounds):
        for turn in range(len(runs)):
            which = (number + turn) % len(runs)
            start = time.perf_counter()
            runs[which]()
            times[which].append(time.perf_counter() - start)
    return times


def libraries(paths: Sequence[Path]) -> dict[str, ctypes.CDLL]:
    """By name: the installed one, and others."""
    installed, reason = load()
    if installed is None:
        raise SystemExit(reason)
    found = {"installed": installed}
    for path in paths:
        library = found[path.name] = ctypes.CDLL(str(path.resolve()))
        if (abi := library.quire_abi()) != ABI:
            raise SystemExit(f"{path} takes other arguments: its version is {abi}, and {ABI} is needed")
    return found


def recorded(weights: Sequence[Any], rows: int, memory: Memory) -> Step:
    """Each weight's product with so many rows; the calls point to `memory`, and to inputs that the step keeps."""
    inputs = [torch.randn(rows, weight.inputs).bfloat16() for weight in weights]
    with record(memory) as step:
        for x, weight in zip(inputs, weights, strict=True):
            ops.linear(x, weight, None)
    step.kept += inputs
    return step


def table(
    builds: Mapping[str, ctypes.CDLL], kind: str, rows: int, weights: Sequence[Any], num_rounds: int
) -> Iterator[str]:
    memory = Memory()
    step = recorded(weights, rows, memory)
    times = compare([replayed(library, step) for library in builds.values()], num_rounds)
    operations = 2 * rows * sum(weight.outputs * weight.inputs for weight in weights)
    size = sum(weight.data.nbytes for weight in weights)
    for name, seconds in zip(builds, times, strict=True):
        middle = statistics.median(seconds)
        ratio = statistics.median(a / b for a, b in zip(times[0], seconds, strict=True))
        figures = (
            f"{middle * 1e3:.2f} | {size / middle / 1e9:.1f} | {operations / middle / 1e9:.0f} | {ratio:.2f}"
        )
        yield f"| {kind} | {rows} | {name} | {figures} |"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("builds", nargs="*", type=Path, metavar="LIBRARY")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 32])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--huge-pages", action="store_true", help="Copy weights there first.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    builds = libraries(args.builds)
    print("| kind | rows | build | ms | weights, GB/s | GFLOP/s | times as fast |\n" + "|---" * 7 + "|")
    plain = [torch.randn(shape, dtype=torch.bfloat16) / 50 for shape in SHAPES]
    for kind in args.kinds:
        weights = [pack(weight, kind) for _ in range(NUM_LAYERS) for weight in plain]
        for weight in weights if args.huge_pages else ():
            collapse(weight.data)
        for rows in args.rows:
            print(*table(builds, kind, rows, weights, args.rounds), sep="\n", flush=True)


if __name__ == "__main__":
    main()
