"""Whole workloads through `LLM` on a GPU: tokens per second, and the share of what the machine could do at best.

    python benchmarks/gpu/offline.py [--models 8B 0.6B] [--cases prompts mixed shared] [--runs 3] [--option NAME=VALUE]

Random weights in the shapes of Llama 3.1 8B and Qwen3 0.6B, prompts of random tokens; medians of some runs.

    prompts   requests of one output token each: prompt tokens/s
    mixed     256 requests of 100 to 1,024 tokens in and 100 to 1,024 out, temperature 0.6: output tokens/s
    shared    64 requests with 4,096 tokens in common, which are cached, of 4,160; 64 tokens out: seconds

The bound is `quire bench`'s: every token multiplied with every weight, every step reading weights and cache, at speeds
measured here. Of a shared prompt only what is not cached counts.
"""

import argparse
import dataclasses
import gc
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.gpu.shapes import folder_of, kernels_compiled  # noqa: E402
from quire import LLM, SamplingParams  # noqa: E402
from quire.cli.bound import Needs, Speed, bound_s, measure  # noqa: E402
from quire.cli.workload import Shape, Workload  # noqa: E402
from quire.resolve import ITEM_BYTES  # noqa: E402
from quire.types import OutputKind, TokensPrompt  # noqa: E402

PROMPTS = {"8B": [(1, 2048), (32, 2048), (4, 8000)], "0.6B": [(32, 2048)]}
MIXED = Shape(input_len=562, output_len=562, num_prompts=256, range_ratio=462 / 562)
TEMPERATURE = 0.6
SHARED, OWN, SHARERS, SHARED_OUTPUTS = 4096, 64, 64, 64
LENGTH = 8192


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """A workload, drawn anew for each run, and what its figure counts."""

    name: str
    unit: str
    temperature: float = 0.0
    shape: Shape | None = None  # None: the shared prompt

    def draw(self, chance: random.Random, vocab_size: int) -> Workload:
        if self.shape is not None:
            return self.shape.draw(chance, vocab_size)
        common = tuple(random.Random(0).choices(range(vocab_size), k=SHARED))
        own = Shape(input_len=OWN, output_len=SHARED_OUTPUTS, num_prompts=SHARERS).draw(chance, vocab_size)
        return dataclasses.replace(own, prompts=tuple(common + prompt for prompt in own.prompts))

    def figure(self, work: Workload, seconds: float) -> float:
        """In `unit`."""
        counts = {"prompt tok/s": sum(work.input_lens), "output tok/s": work.num_output_tokens}
        return counts[self.unit] / seconds if self.unit in counts else seconds

    def bound(self, speed: Speed, needs: Needs, work: Workload) -> float:
        """Seconds."""
        cached = 0 if self.shape is not None else SHARED
        least = bound_s(speed, needs, [length - cached for length in work.input_lens], work.output_lens)
        reads = max(work.output_lens) * needs.cache_bytes(cached)  # by all sharers at once
        return least + reads / speed.bytes_per_s


def cases_of(model: str, kinds: Sequence[str]) -> Iterator[Case]:
    if "prompts" in kinds:
        for count, length in PROMPTS[model]:
            shape = Shape(input_len=length, output_len=1, num_prompts=count)
            yield Case(f"{count} x {length:,} in", "prompt tok/s", shape=shape)
    if "mixed" in kinds:
        yield Case("256 x 100-1,024 in and out", "output tok/s", TEMPERATURE, MIXED)
    if "shared" in kinds:
        yield Case(f"{SHARERS} sharing {SHARED:,} of {SHARED + OWN:,}", "s")


def run(llm: LLM, case: Case, work: Workload) -> float:
    """Seconds."""
    params = [
        SamplingParams(
            temperature=case.temperature,
            max_tokens=count,
            ignore_eos=True,
            detokenize=False,
            output_kind=OutputKind.FINAL_ONLY,
        )
        for count in work.output_lens
    ]
    prompts = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in work.prompts]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    made = sum(len(output.outputs[0].token_ids) for output in outputs)
    if made != work.num_output_tokens:
        raise RuntimeError(f"{made} tokens came out, and {work.num_output_tokens} were asked for")
    return seconds


def bench(model: str, args: argparse.Namespace, speed: Speed) -> None:
    options = dict(option.split("=", 1) for option in args.option)
    with (
        folder_of(model) as folder,
        LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            disable_log_stats=True,
            max_model_len=LENGTH,
            **{name: int(value) if value.isdigit() else value for name, value in options.items()},
        ) as llm,
    ):
        kernels_compiled()
        needs = Needs(llm.spec, ITEM_BYTES[llm.config.dtype])
        for case in cases_of(model, args.cases):
            chance = random.Random(len(case.name))
            run(llm, case, case.draw(chance, llm.spec.vocab_size))  # warm: kernels, graphs, the common prompt
            figures, shares = [], []
            for _ in range(args.runs):
                work = case.draw(chance, llm.spec.vocab_size)
                seconds = run(llm, case, work)
                figures.append(case.figure(work, seconds))
                shares.append(case.bound(speed, needs, work) / seconds)
            middle, share = statistics.median(figures), statistics.median(shares)
            low, high = min(figures), max(figures)
            print(
                f"| {model} | {case.name} | {middle:,.5g} {case.unit} | {low:,.5g}-{high:,.5g} | {share:.0%} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(PROMPTS), choices=list(PROMPTS))
    parser.add_argument("--cases", nargs="+", default=["prompts", "mixed", "shared"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="Of `LLM`.")
    args = parser.parse_args()
    speed = measure(torch.device("cuda"), torch.bfloat16)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, reads {speed.bytes_per_s / 1e12:.2f} TB/s,"
        f" multiplies {speed.flops_per_s / 1e12:.0f} TFLOP/s\n"
    )
    print("| model | requests | median | of all runs | of the bound |\n|---|---|---|---|---|", flush=True)
    for model in args.models:
        bench(model, args, speed)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
