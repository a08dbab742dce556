"""What a decode step takes with structured outputs and without, in milliseconds, medians of rounds.

    OMP_NUM_THREADS=1 python -m benchmarks.grammars.speed [MODEL] [--load-format dummy] [--batch 64] [--clock wall]

Of processor time, which other programs do not change; only a wall clock shows what is done at the same time. All rows
have the form, and none ends. Rounds of all forms take turns. The last column is without what the engine does around its
runner, with and without forms alike.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from quire import LLM, SamplingParams
from quire.types import StructuredOutputsParams

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog", "bird"]},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
}
FORMS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "JSON schema": {"json": {"type": "array", "items": PERSON, "minItems": 1000}},
    "regex": {"regex": "([a-z]{1,8} [0-9]{1,4}, ){1000}"},
}
SKIPPED = 4  # steps after all rows have begun


CLOCKS = {"processor": time.process_time, "wall": time.perf_counter}


class Meter:
    """Counts time inside of a runner."""

    def __init__(self, runner: Any, clock: Callable[[], float]):
        self.s, self.clock = 0.0, clock
        runner.launch, runner.sample = self.timed(runner.launch), self.timed(runner.sample)

    def timed(self, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def timed(plan: Any) -> Any:
            began = self.clock()
            try:
                return call(plan)
            finally:
                self.s += self.clock() - began

        return timed


def round_of(
    llm: LLM, meter: Meter, form: dict[str, Any] | None, batch: int, count: int
) -> tuple[float, float]:
    """Medians of `count` steps: whole, and inside of the runner."""
    engine, asked = llm.engine, None if form is None else StructuredOutputsParams(**form)
    names = [f"{i}" for i in range(batch)]
    for i, name in enumerate(names):
        params = SamplingParams(
            temperature=1.0, seed=i, max_tokens=1500, ignore_eos=form is None, structured_outputs=asked
        )
        engine.add(engine.inputs.request(f"Number {i}:", params, request_id=name))
    while engine.core.stats().batched_tokens != batch:
        engine.step()
    whole, inside = [], []
    for _ in range(SKIPPED + count):
        began, before = meter.clock(), meter.s
        engine.step()
        whole.append(meter.clock() - began)
        inside.append(meter.s - before)
        if engine.core.stats().batched_tokens != batch:
            raise RuntimeError("a sequence ended")
    for name in names:
        engine.abort(name)
    while not engine.idle:
        engine.step()
    return statistics.median(whole[SKIPPED:]), statistics.median(inside[SKIPPED:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="of a round")
    parser.add_argument("--clock", choices=CLOCKS, default="processor")
    args = parser.parse_args()
    options = {"max_num_seqs": args.batch, "max_model_len": 2048, "load_format": args.load_format}
    with LLM(args.model, device="cpu", disable_log_stats=True, **options) as llm:
        meter = Meter(llm.engine.core.runner, CLOCKS[args.clock])
        for form in FORMS.values():
            round_of(llm, meter, form, args.batch, args.steps)
        rounds = [
            {name: round_of(llm, meter, form, args.batch, args.steps) for name, form in FORMS.items()}
            for _ in range(args.rounds)
        ]
    print("| form | step, ms | of it the runner | speed | without the engine |\n|---|---|---|---|---|")
    for name in FORMS:
        times = [statistics.median(each[name][k] for each in rounds) * 1e3 for k in (0, 1)]
        ratios = [statistics.median(each["none"][k] / each[name][k] for each in rounds) for k in (0, 1)]
        print(f"| {name} | {times[0]:.2f} | {times[1]:.2f} | {ratios[0]:.1%} | {ratios[1]:.1%} |")


if __name__ == "__main__":
    main()
