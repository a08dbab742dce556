"""Where a decode step goes: its median time, and the shares of linear layers, attention and sampling.

    python benchmarks/decode_step.py [--quantization auto int8 int4] [--dtype bfloat16]

The network is that of against_transformers.py, with random weights, after prompts of random tokens.
"""

import argparse
import cProfile
import json
import pstats
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from against_transformers import SHAPE

from quire import LLM, SamplingParams

NUM_STEPS = 16
PARTS = {"linear": "linear_native", "attention": "attend", "sampling": "draw"}  # functions, as profiled


def measure(folder: Path, num_sequences: int, prompt_len: int, **options: str) -> str:
    """One line: prompt tokens per second, a step's time, and what its parts take, profiled separately."""
    chance = random.Random(0)
    params = SamplingParams(temperature=0, max_tokens=3 * NUM_STEPS, ignore_eos=True)
    base = {
        "device": "cpu",
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": 2048,
        "disable_log_stats": True,
    }
    start = time.perf_counter()
    with LLM(str(folder), **base | options) as llm:
        ready, engine = time.perf_counter() - start, llm.engine
        for i in range(num_sequences):
            prompt = [chance.randrange(llm.spec.vocab_size) for _ in range(prompt_len)]
            engine.add(engine.inputs.request(prompt, params, request_id=str(i)))
        start = time.perf_counter()
        while engine.core.stats().batched_tokens != num_sequences:
            engine.step()
        prefill = num_sequences * prompt_len / (time.perf_counter() - start)
        times = [timed(engine.step) for _ in range(NUM_STEPS)]
        engine.core.runner.fixed = None  # which would call all kernels at once
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(NUM_STEPS):
            engine.step()
        profile.disable()
    spent = dict.fromkeys(PARTS, 0.0)
    for (file, _, name), (_, _, _, whole, _) in pstats.Stats(profile).stats.items():
        for part, function in PARTS.items():
            if name == function and "quire" in file:
                spent[part] += whole * 1e3 / NUM_STEPS
    parts = ", ".join(f"{part} {ms:.1f}" for part, ms in spent.items())
    return (
        f"{options['quantization']}, {num_sequences} x {prompt_len}: ready in {ready:.1f} s,"
        f" prompts {prefill:.0f} tok/s,"
        f" step {statistics.median(times):.1f} ms ({parts})"
    )


def timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quantization", nargs="+", default=["auto"])
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(SHAPE))
        for num_sequences, prompt_len in ((1, 512), (4, 128), (32, 128)):
            for quantization in args.quantization:
                options = {"quantization": quantization, "dtype": args.dtype}
                print(measure(folder, num_sequences, prompt_len, **options), flush=True)


if __name__ == "__main__":
    main()
