"""A server on a GPU and a client beside it: `quire serve`, and `quire bench serve` at several numbers of streams.

    python benchmarks/gpu/online.py [--models 8B 0.6B] [--streams 1 8 64 256] [--input 512] [--output 128] [-- OPTIONS]

Random weights in the shapes of Llama 3.1 8B and Qwen3 0.6B, with the demo model's tokenizer; prompts of random tokens,
lengths uniform within half of the given ones, greedy. OPTIONS are the server's. "Ready" is from the start of the
process to the first answer of /readyz.
"""

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu.shapes import SHAPES, folder_of  # noqa: E402

QUIRE = (sys.executable, "-m", "quire.cli.main")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
START_S, ROUNDS, MOST_REQUESTS = 600, 4, 512  # requests of each stream, but not more in all
COLUMNS = (
    ("output tok/s", "output_throughput"),
    ("TTFT p50 ms", "median_ttft_ms"),
    ("TTFT p99", "p99_ttft_ms"),
    ("TPOT p50 ms", "median_tpot_ms"),
    ("TPOT p99", "p99_tpot_ms"),
)


@contextmanager
def served(model: str, options: Sequence[str]) -> Iterator[tuple[str, float]]:
    """(Address of a server of the network, seconds until it was ready.)"""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with folder_of(model) as folder:
        for name in TOKENIZER:
            shutil.copy(ROOT / "quire" / "demo" / name, folder)
        command = (*QUIRE, "serve", folder, "--load-format", "dummy", "--port", str(port), *options)
        start = time.perf_counter()
        server = subprocess.Popen([*command, "--disable-access-log"], cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            while not is_ready(url):
                if server.poll() is not None or time.perf_counter() - start > START_S:
                    raise RuntimeError(f"the server did not start: {' '.join(command)}")
                time.sleep(0.05)
            yield url, time.perf_counter() - start
        finally:
            server.terminate()
            server.wait()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def bench(url: str, streams: int, args: argparse.Namespace) -> dict[str, Any]:
    """What `quire bench serve` found."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*QUIRE, "bench", "serve", "--base-url", url, "--temperature", "0", "--ignore-eos"]
        command += ["--random-input-len", str(args.input), "--random-output-len", str(args.output)]
        command += ["--random-range-ratio", "0.5", "--max-concurrency", str(streams), "--disable-tqdm"]
        command += ["--num-prompts", str(max(min(ROUNDS * streams, MOST_REQUESTS), streams))]
        command += ["--num-warmups", str(min(streams, 8)), "--seed", str(streams)]
        command += ["--save-result", "--result-dir", folder, "--result-filename", "found.json"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads((Path(folder) / "found.json").read_text())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["8B", "0.6B"], choices=list(SHAPES))
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--input", type=int, default=512)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("options", nargs="*", metavar="OPTIONS")
    args = parser.parse_args()
    names = [name for name, _ in COLUMNS]
    print(f"| model | streams | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}", flush=True)
    for model in args.models:
        with served(model, args.options) as (url, seconds):
            print(f"<!-- {model}: ready in {seconds:.1f} s -->", flush=True)
            # Not measured: kernels are compiled and graphs captured meanwhile.
            bench(url, max(args.streams), args)
            for streams in args.streams:
                found = bench(url, streams, args)
                cells = " | ".join(f"{found[key]:,.4g}" for _, key in COLUMNS)
                print(f"| {model} | {streams} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
