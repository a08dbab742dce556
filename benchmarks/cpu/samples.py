"""Samples of contestants on a machine that others use, too, and their table. Knows no contestants.

A sample is kept if others took little of the processors meanwhile, else dropped and counted.
"""

import argparse
import platform
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.cpu.machine import Meter, Probe, wait_quiet

Figures = Mapping[str, float]  # by measure
Rounds = dict[int, float]  # by number of the round


@dataclass(frozen=True, slots=True)
class Samples:
    """What was found with one network and one number of threads.

    Attributes:
        units: of each measure; seconds and milliseconds are better if they are fewer.
        found: by measure and contestant.
    """

    units: Mapping[str, str]
    probe: Probe
    others: float
    patience_s: float
    probes: list[tuple[float, float]] = field(default_factory=list)
    found: dict[tuple[str, str], Rounds] = field(default_factory=lambda: defaultdict(dict))
    dropped: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))

    def take(self, name: str, number: int, run: Callable[[], Figures], pid: int | None = None) -> None:
        """One sample of a contestant, whose process is `pid` if it has one that stays."""
        wait_quiet(self.others, self.patience_s)
        self.probes.append(self.probe())
        meter = Meter(pid)
        figures = run()
        others = meter.others()
        for measure, figure in figures.items():
            if others <= self.others:
                self.found[measure, name][number] = figure
            else:
                self.dropped[measure, name] += 1
            line = f"{number}: {measure}, {name}: {figure:.5g} {self.units[measure]}, others {others:.2f}"
            print(line, file=sys.stderr, flush=True)

    def table(self, names: Sequence[str]) -> Iterator[str]:
        """In Markdown, a row for each measure and contestant; the columns of ours say how many times as good."""
        ours = [name for name in names if name.startswith("Quire")]
        yield f"| measure | contestant | median (min-max) | kept, dropped |{''.join(f' {n} |' for n in ours)}"
        yield "|" + "---|" * (4 + len(ours))
        for measure, unit in self.units.items():
            for name in names:
                rounds = self.found.get((measure, name), {})
                dropped = self.dropped.get((measure, name), 0)
                if rounds or dropped:
                    middle = f"{spread([*rounds.values()])} {unit}" if rounds else "-"
                    ratios = [self.ratio(measure, one, name) for one in ours]
                    cells = (measure, name, middle, f"{len(rounds)}, {dropped}", *ratios)
                    yield f"| {' | '.join(cells)} |"

    def ratio(self, measure: str, ours: str, other: str) -> str:
        """The median over the rounds that have both."""
        a, b = self.found.get((measure, ours), {}), self.found.get((measure, other), {})
        fewer = self.units[measure] in ("s", "ms")
        ratios = [b[k] / a[k] if fewer else a[k] / b[k] for k in a.keys() & b.keys()]
        return f"{statistics.median(ratios):.2f}x" if ratios and ours != other else "-"

    def report(self, names: Iterable[str]) -> None:
        if not self.probes:
            return
        read, multiply = zip(*self.probes, strict=True)
        kept, dropped = sum(map(len, self.found.values())), sum(self.dropped.values())
        print("", *self.table([*names]), sep="\n")
        print(f"\nProbes: reads {spread(read)} GB/s, multiplies {spread(multiply)} GFLOP/s in float32.")
        print(f"{kept} figures kept, {dropped} dropped because of others.\n", flush=True)


def spread(values: Sequence[float]) -> str:
    three = statistics.median(values), min(values), max(values)
    middle, low, high = (f"{value:,.0f}" if value >= 1000 else f"{value:.4g}" for value in three)
    return f"{middle} ({low}-{high})"


def in_turn(names: Sequence[str], number: int) -> list[str]:
    """Each round begins with another, so that none always follows the same."""
    begin = number % max(len(names), 1)
    return [*names[begin:], *names[:begin]]


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = f"{len(models)} x {models[0]}" if models else platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}\n"


def add_options(parser: argparse.ArgumentParser) -> None:
    """How samples are taken."""
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--others", type=float, default=0.15, help="Processors that others may take (0.15).")
    parser.add_argument("--patience", type=float, default=60, metavar="S", help="To wait for others (60).")
