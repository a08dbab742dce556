"""What the engine adds to the network in a decode step on a CPU: microseconds of a step, and of its kernels.

    python benchmarks/step_overhead.py [--sequences 1 8 32]

The network has one layer of 64 numbers and 256 tokens, so that nearly all is what surrounds any network. Kernels are
those of the whole step, input and sampling included, replayed by themselves.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from against_transformers import SHAPE

from quire import LLM, SamplingParams
from quire.engine.engine import Engine
from quire.runner.fixed import FixedKind
from quire.runner.recordings import Recordings
from quire.sampling.slots import Uses

TINY = SHAPE | {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 256}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
PROMPT_LEN, NUM_STEPS, LENGTH = 16, 400, 2048


def median_us(run: Callable[[], object]) -> float:
    times = []
    for _ in range(NUM_STEPS):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def measure(engine: Engine, num_sequences: int, vocab_size: int) -> str:
    """One row of a table."""
    chance = random.Random(0)
    params = SamplingParams(temperature=0, max_tokens=LENGTH - PROMPT_LEN, ignore_eos=True)
    for i in range(num_sequences):
        prompt = [chance.randrange(vocab_size) for _ in range(PROMPT_LEN)]
        engine.add(engine.inputs.request(prompt, params, request_id=str(i)))
    while engine.core.stats().batched_tokens != num_sequences:
        engine.step()
    step = median_us(engine.step)
    fixed = engine.core.runner.fixed
    if fixed is None or not isinstance(fixed.graphs, Recordings):
        raise RuntimeError("steps are not recorded here: Quire's C++ kernels are missing")
    kind = FixedKind(num_sequences, fixed.state.max_length, Uses(0), shares=False)
    kernels = median_us(lambda: fixed.graphs.run(kind, fixed.compute, fixed.sizes[-1]))
    for i in range(num_sequences):
        engine.abort(str(i))
    while not engine.idle:
        engine.step()
    return f"| {num_sequences} | {step:,.0f} | {kernels:,.0f} | {step - kernels:,.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", nargs="+", type=int, default=[1, 8, 32])
    args = parser.parse_args()
    print("| sequences | step, us | kernels | the rest |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(TINY))
        options = {"load_format": "dummy", "skip_tokenizer_init": True, "disable_log_stats": True}
        with LLM(folder, device="cpu", max_model_len=LENGTH, **options) as llm:
            for num_sequences in args.sequences:
                print(measure(llm.engine, num_sequences, llm.spec.vocab_size), flush=True)


if __name__ == "__main__":
    main()
