"""Kernels of a CPU: products by rows and kind of weight, and what a recorded decode step spends in each kernel.

    python benchmarks/cpu/kernels.py [--threads 1 --positions 128]

Products have a weight of 6,144 x 1,024, of which there are more than the processor's caches hold; the best of several
rounds. A step is Qwen3 0.6B's with random weights in bfloat16: its calls one by one, in the best of several rounds.
"""

import argparse
import ctypes
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.gpu.shapes import SHAPES  # noqa: E402
from quire import LLM, SamplingParams  # noqa: E402
from quire.kernels import ops  # noqa: E402
from quire.kernels.cpu.calls import LAYOUTS, Memory, Step, kernel, record  # noqa: E402
from quire.runner.fixed import FixedKind  # noqa: E402
from quire.sampling.slots import Uses  # noqa: E402

OUTPUTS, INPUTS, NUM_WEIGHTS = 6144, 1024, 12
ROWS, ROUNDS = (1, 8, 32, 512), 5
SEQUENCES = (1, 8, 32)
KINDS = ("float32", "bfloat16", "int8", "int4")


def pack(weight: torch.Tensor, kind: str) -> Any:
    return ops.quantize_linear(weight, int(kind[3:])) if kind.startswith("int") else ops.pack_linear(weight)


def names() -> dict[int, str]:
    """Of the kernels in the library that is installed, by address."""
    return {kernel(name).address: name for name in LAYOUTS}


def weights(kind: str) -> tuple[torch.dtype, list[Any]]:
    """(Type of the inputs, packed weights)."""
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    return dtype, [pack(torch.randn(OUTPUTS, INPUTS).to(dtype), kind) for _ in range(NUM_WEIGHTS)]


def products(kind: str) -> Iterator[str]:
    dtype, packed = weights(kind)
    for rows in ROWS:
        x, seconds = torch.randn(rows, INPUTS).to(dtype), []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for weight in packed:
                ops.linear(x, weight, None)
            seconds.append((time.perf_counter() - start) / NUM_WEIGHTS)
        rate = 2 * rows * OUTPUTS * INPUTS / min(seconds) / 1e9
        read = packed[0].data.nbytes / min(seconds) / 1e9
        yield f"| {kind} | {rows} | {min(seconds) * 1e3:.2f} | {rate:.0f} | {read:.1f} |"


def calls(step: Step) -> Counter[str]:
    """Milliseconds by kernel."""
    named = names()
    made = [
        (named[address].removeprefix("quire_"), ctypes.CFUNCTYPE(None, ctypes.c_char_p)(address), args)
        for address, args in step.calls
    ]
    rounds = []
    for _ in range(ROUNDS):
        times: Counter[str] = Counter()
        for name, call, args in made:
            start = time.perf_counter()
            call(args)
            times[name] += (time.perf_counter() - start) * 1e3
        rounds.append(times)
    return min(rounds, key=Counter.total)


def steps(quantization: str, positions: int, threads: int) -> Iterator[str]:
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(SHAPES["0.6B"]))
        options: dict[str, Any] = {
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
        }
        options |= {"device": "cpu", "num_threads": threads, "dtype": "bfloat16"}
        options["max_model_len"] = positions + 64
        with LLM(folder, quantization=quantization, **options) as llm:
            engine, sampling = llm.engine, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
            for count in SEQUENCES:
                for number in range(count):
                    prompt = [chance.randrange(1000) for _ in range(positions)]
                    engine.add(engine.inputs.request(prompt, sampling, request_id=str(number)))
                while engine.core.stats().batched_tokens != count:
                    engine.step()
                fixed = engine.core.runner.fixed
                kind = FixedKind(count, fixed.state.max_length, Uses(0), shares=False)
                memory = Memory()  # stays: the calls point to it
                with torch.inference_mode(), record(memory) as step:
                    fixed.compute(kind)
                times = calls(step)
                largest = ", ".join(f"{name} {ms:.2f}" for name, ms in times.most_common(8))
                yield f"| {quantization} | {count} | {times.total():.1f} | {largest} |"
                for number in range(count):
                    engine.abort(str(number))
                while not engine.idle:
                    engine.step()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--positions", type=int, default=128, help="of each sequence, before the step")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| weight | rows | ms | GFLOP/s | weight, GB/s |\n|---|---|---|---|---|")
    for kind in KINDS:
        print(*products(kind), sep="\n", flush=True)
    print("\n| weights | sequences | ms | kernels |\n|---|---|---|---|")
    for quantization in ("auto", "int8", "int4"):
        for line in steps(quantization, args.positions, args.threads):
            print(line, flush=True)


if __name__ == "__main__":
    main()
