"""What operations with a state of each sequence take on a GPU, position by position and in chunks.

    python benchmarks/gpu/states.py

Sizes of a layer of Qwen3-Next, Kimi Linear, Mamba-2 2.7B and Jamba, bfloat16 values; microseconds: medians of 20 calls.
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from quire.kernels import ops  # noqa: E402

GPU = torch.device("cuda")
BATCHES = ((4, 2048), (1, 8192))  # sequences, and positions of each
MATRICES = {  # heads, heads of keys, dimensions of keys and values, delta rule, a decay for each dimension
    "Qwen3-Next": (32, 16, 128, 128, True, False),
    "Kimi Linear": (32, 32, 128, 128, True, True),
    "Mamba-2": (80, 1, 128, 64, False, False),
}
CALLS = 20


def microseconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(CALLS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[3:])


def matrices(name: str, num_seqs: int, length: int) -> Callable[[bool], float]:
    heads, key_heads, dk, dv, delta, per_channel = MATRICES[name]
    total = num_seqs * length
    v = torch.randn(total, heads, dv, device=GPU, dtype=torch.bfloat16)
    q, k = (
        torch.nn.functional.normalize(torch.randn(total, key_heads, dk, device=GPU), dim=-1) for _ in range(2)
    )
    decay = torch.rand(total, heads, dk if per_channel else 1, device=GPU) ** 0.05
    beta = torch.rand(total, heads, device=GPU) if delta else None
    states = torch.zeros(num_seqs, heads, dk, dv, device=GPU)
    rows, starts = torch.arange(num_seqs, device=GPU), torch.arange(num_seqs + 1, device=GPU).int() * length
    return lambda in_chunks: microseconds(
        lambda: ops.recurrence(v, q, k, decay, beta, states, rows, starts, in_chunks)
    )


def others(num_seqs: int, length: int) -> tuple[float, float]:
    """A convolution of 8,192 channels, and a scan of as many."""
    total, channels, size = num_seqs * length, 8192, 16
    rows, starts = torch.arange(num_seqs, device=GPU), torch.arange(num_seqs + 1, device=GPU).int() * length
    x = torch.randn(total, channels, device=GPU)
    half, weight = x.bfloat16(), torch.randn(channels, 4, device=GPU, dtype=torch.bfloat16)
    seen = torch.zeros(num_seqs, channels, 3, device=GPU, dtype=torch.bfloat16)
    convolved = microseconds(lambda: ops.causal_conv(half, weight, None, seen, rows, starts, True))
    rate, skip = -torch.rand(size, channels, device=GPU), torch.rand(channels, device=GPU)
    b, c = (torch.randn(total, size, device=GPU) for _ in range(2))
    states = torch.zeros(num_seqs, size, channels, device=GPU)
    scanned = microseconds(
        lambda: ops.selective_scan(x, x.abs(), rate, b, c, skip, states, rows, starts),
    )
    return convolved, scanned


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| operation | sequences | positions of each | us, position by position | us, in chunks |")
    print("|---|---|---|---|---|", flush=True)
    for num_seqs, length in BATCHES:
        for name in MATRICES:
            time = matrices(name, num_seqs, length)
            chunked = "" if MATRICES[name][-1] else f"{time(True):.0f}"
            print(
                f"| recurrence of {name} | {num_seqs} | {length} | {time(False):.0f} | {chunked} |",
                flush=True,
            )
        for name, spent in zip(("convolution", "scan of Jamba"), others(num_seqs, length), strict=True):
            print(f"| {name} | {num_seqs} | {length} | {spent:.0f} | |", flush=True)


if __name__ == "__main__":
    main()
