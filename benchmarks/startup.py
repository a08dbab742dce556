"""How long starting takes: best and median of several fresh interpreters.

    python benchmarks/startup.py [FOLDER]

With a checkpoint's folder, also from a process's start to its first token on a CPU, with weights as they are and
quantized, and how much memory that takes that is not the files'. The files are in the page cache after the first round.
"""

import re
import statistics
import subprocess
import sys
import time

CASES = {
    "empty interpreter": ("pass", None),
    "import quire": ("import quire", 0.2),
    "quire --help": ("from quire.cli.main import main; main(['--help'])", 0.3),
    "quire run --help": ("from quire.cli.main import main; main(['run', '--help'])", 0.3),
}
ROUNDS, TOKEN_ROUNDS = 15, 5
FIRST_TOKEN = """
import sys, time
from pathlib import Path
from quire import LLM, SamplingParams
folder, quantization = sys.argv[1:]
options = dict(device="cpu", dtype="bfloat16", quantization=quantization, skip_tokenizer_init=True)
with LLM(folder, max_model_len=2048, kv_cache_memory_bytes=256 << 20, **options) as llm:
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1), use_tqdm=False)
    print("now", time.time())
    print(Path("/proc/self/status").read_text())
"""


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def first_token(folder: str, quantization: str) -> None:
    """The weights are those that Quire's line at the start counts; few blocks of the cache are used yet."""
    times, memory, weights = [], [], 0.0
    for _ in range(TOKEN_ROUNDS):
        start = time.time()
        command = [sys.executable, "-c", FIRST_TOKEN, folder, quantization]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        times.append(_number(r"now ([\d.]+)", done.stdout) - start)
        memory.append(_number(r"RssAnon:\s+(\d+) kB", done.stdout) / 1024)
        weights = _number(r"weights ([\d.]+) GiB", done.stderr) * 1024
    print(
        f"first token, {quantization:5} best {min(times):6.2f} s   median {statistics.median(times):6.2f} s   memory"
        f" {statistics.median(memory):,.0f} MiB, weights {weights:,.0f} MiB"
    )


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in {text!r}")
    return float(found[1])


def main() -> None:
    for name, (code, limit) in CASES.items():
        times = [seconds(code) for _ in range(ROUNDS)]
        verdict = (
            ""
            if limit is None
            else f"  limit {limit} s: {'ok' if statistics.median(times) < limit else 'OVER'}"
        )
        best, median = min(times) * 1e3, statistics.median(times) * 1e3
        print(f"{name:18} best {best:6.0f} ms  median {median:6.0f} ms{verdict}")
    for folder in sys.argv[1:2]:
        for quantization in ("auto", "int8", "int4"):
            first_token(folder, quantization)


if __name__ == "__main__":
    main()
