"""A decode step of the whole engine on a GPU: its time, and the share of what reading weights and cache would allow.

    python benchmarks/gpu/decode.py [--models 8B 0.6B] [--batches 1 8 64 256 32x4096 1x130816+31x4096]
        [--deterministic] [--eager] [--profile] [--dtype bfloat16]

Random weights in the shapes of Llama 3.1 8B and Qwen3 0.6B (and 30B-A3B, of 61 GB, if asked for), prompts of random
tokens, greedy. A batch is a number of sequences of about 190 positions each, or says how many there are of which
length. A time is the median of a few runs of some steps, as `LLM` takes them: scheduling, sampling and outputs
included. `host` is what of it the host did not wait for the device. The bound is (weights + cached keys and values) /
measured reading speed; of experts, those count that so many tokens meet if all are as likely. --deterministic measures
that mode; --eager measures without CUDA graphs too; --profile prints kernels and Python functions of some steps.
"""

import argparse
import cProfile
import gc
import io
import pstats
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.gpu.shapes import SHAPES, folder_of, kernels_compiled  # noqa: E402
from quire import LLM, SamplingParams  # noqa: E402
from quire.attention.states import state_bytes  # noqa: E402
from quire.cli.bound import Layer  # noqa: E402
from quire.models.parameters import kv_bytes_per_token, num_parameters  # noqa: E402
from quire.runner.runner import Runner  # noqa: E402
from quire.scheduler.plan import Plan  # noqa: E402
from quire.types import OutputKind  # noqa: E402

LENGTH = 190  # positions halfway through the runs
WARM_UP, RUNS, STEPS = 12, 5, 10  # steps before, and in each of the runs
HALFWAY = WARM_UP + RUNS * STEPS // 2


@triton.jit
def read(x, out, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums of COUNT numbers, for how fast memory is read."""
    at = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    tl.store(out + tl.program_id(0), tl.sum(tl.load(x + at), 0))


def bytes_per_s() -> float:
    """What this GPU reads, from 4 GiB."""
    count, size = 4096, 1 << 30
    x = torch.zeros(size, dtype=torch.float32, device="cuda")
    out = torch.empty(size // count, device="cuda")
    times = []
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        read[(size // count,)](x, out, COUNT=count, num_warps=4)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 4 * size / statistics.median(times[1:])


class Waits:
    """A runner that measures how long its results were waited for."""

    def __init__(self, runner: Runner):
        self.runner, self.waited_s = runner, 0.0

    def launch(self, plan: Plan) -> None:
        self.runner.launch(plan)

    def sample(self, plan: Plan, masks: None = None) -> Callable[[], Any]:
        fetch = self.runner.sample(plan, masks)

        def timed() -> Any:
            start = time.perf_counter()
            result = fetch()
            self.waited_s += time.perf_counter() - start
            return result

        return timed


def lengths_of(batch: str) -> list[int]:
    """`8` is eight sequences of the usual length, `1x130816+31x4096` one long and many shorter ones."""
    parts = [part.partition("x") for part in batch.split("+")]
    return [length for count, _, size in parts for length in [int(size or LENGTH)] * int(count)]


class Case:
    """One engine with sequences that decode, of `lengths` halfway through the runs."""

    def __init__(self, llm: LLM, lengths: Sequence[int], num_steps: int):
        self.engine, self.count = llm.engine, len(lengths)
        core = self.engine.core
        self.waits = Waits(core.runner)
        core.loop.device = self.waits
        chance = random.Random(len(lengths))
        most = WARM_UP + num_steps + 20
        params = SamplingParams(
            temperature=0, max_tokens=most, ignore_eos=True, output_kind=OutputKind.FINAL_ONLY
        )
        for i, length in enumerate(lengths):
            prompt = [chance.randrange(llm.spec.vocab_size) for _ in range(length - HALFWAY)]
            self.engine.add(self.engine.inputs.request(prompt, params, request_id=str(i)))
        while core.stats().num_waiting or core.stats().prefill_tokens or not core.stats().num_running:
            self.engine.step()
        for _ in range(WARM_UP):
            self.engine.step()

    def run(self) -> tuple[float, float]:
        """Milliseconds of a step, and those of them that the host was busy; a step is in flight before and after."""
        self.waits.waited_s, start = 0.0, time.perf_counter()
        for _ in range(STEPS):
            self.engine.step()
        spent = time.perf_counter() - start
        return spent * 1e3 / STEPS, (spent - self.waits.waited_s) * 1e3 / STEPS

    def close(self) -> None:
        for i in range(self.count):
            self.engine.abort(str(i))
        while not self.engine.idle:
            self.engine.step()


def bound_ms(llm: LLM, lengths: Sequence[int], speed: float, item_bytes: int) -> float:
    """Each step reads all weights but those of experts that nobody meets and the embedding's, and the cache."""
    spec = llm.spec
    weights = num_parameters(spec).total - (0 if spec.tied else spec.vocab_size * spec.dim)
    layers = [Layer.of(block, spec.dim) for block in spec.blocks]
    weights -= sum(layer.expert * (layer.num_experts - layer.met(len(lengths))) for layer in layers)
    cached = sum(lengths) * kv_bytes_per_token(spec, item_bytes)
    states = 2 * len(lengths) * state_bytes(spec, item_bytes)  # which are written, too
    return (weights * item_bytes + cached + states) / speed * 1e3


def profile(case: Case) -> None:
    """Where the device's and the host's time of a step goes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as kernels:
        for _ in range(4):
            case.engine.step()
        torch.cuda.synchronize()
    print(
        kernels.key_averages().table(sort_by="self_cuda_time_total", row_limit=24, max_name_column_width=60),
        flush=True,
    )
    host = cProfile.Profile()
    host.enable()
    for _ in range(8):
        case.engine.step()
    host.disable()
    text = io.StringIO()
    pstats.Stats(host, stream=text).sort_stats("tottime").print_stats(22)
    print("of 8 steps:\n" + "\n".join(text.getvalue().splitlines()[4:]), flush=True)


def measure(llm: LLM, lengths: Sequence[int], profiled: bool) -> tuple[float, float]:
    case = Case(llm, lengths, RUNS * STEPS + (16 if profiled else 0))
    runs = [case.run() for _ in range(RUNS)]
    if profiled:
        profile(case)
    case.close()
    return statistics.median(t for t, _ in runs), statistics.median(t for _, t in runs)


def bench(folder: str, model: str, batches: Sequence[str], args: argparse.Namespace, speed: float) -> None:
    all_lengths = [lengths_of(batch) for batch in batches]
    options = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": max(1024, 256 + max(map(max, all_lengths))),
        "dtype": args.dtype,
        "deterministic": args.deterministic,
    }
    start = time.perf_counter()
    with LLM(folder, **options, max_num_seqs=max(map(len, all_lengths)), disable_log_stats=True) as llm:
        print(f"<!-- {model}: ready in {time.perf_counter() - start:.1f} s -->", flush=True)
        kernels_compiled()
        runner = llm.engine.core.runner
        fixed, mixed, item_bytes = runner.fixed, runner.mixed, 4 if args.dtype == "float32" else 2
        for batch, lengths in zip(batches, all_lengths, strict=True):
            start = time.perf_counter()
            step, host = measure(llm, lengths, args.profile)
            eager = ""
            if args.eager:
                runner.fixed = runner.mixed = None
                eager = f"{measure(llm, lengths, False)[0]:.2f}"
                runner.fixed, runner.mixed = fixed, mixed
            bound = bound_ms(llm, lengths, speed, item_bytes)
            print(
                f"| {model} | {batch} | {step:.3f} | {bound:.3f} | {bound / step:.0%} | {host:.3f} | {eager} |"
                f" <!-- {time.perf_counter() - start:.0f} s -->",
                flush=True,
            )
        if fixed is None:
            print("<!-- no graphs: the log says why -->")
        else:
            graphs = fixed.graphs
            print(f"<!-- {len(graphs.captured)} graphs, failed {graphs.has_failed} -->", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["8B", "0.6B"], choices=list(SHAPES))
    parser.add_argument("--batches", nargs="+", default=["1", "8", "64", "256"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--deterministic", action="store_true")
    args = parser.parse_args()
    speed = bytes_per_s()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, reads {speed / 1e12:.2f} TB/s\n")
    print("| model | batch | ms per step | bound ms | % of bound | host ms | without graphs ms |")
    print("|---|---|---|---|---|---|---|", flush=True)
    torch.cuda.empty_cache()
    for model in args.models:
        with folder_of(model) as folder:
            bench(folder, model, args.batches, args, speed)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
