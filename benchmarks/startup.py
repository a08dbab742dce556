"""How long starting takes: best and median of several fresh interpreters."""

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
ROUNDS = 15


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


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


if __name__ == "__main__":
    main()
