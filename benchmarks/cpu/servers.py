"""Servers on a CPU under one client: `quire serve`, llama-server and vLLM's, in rounds so that all meet the same noise.

    python benchmarks/cpu/networks.py FOLDER --llama-cpp SOURCE --build BUILD
    python benchmarks/cpu/servers.py FOLDER --llama-cpp BUILD --vllm PYTHON --vllm-preload LIBTCMALLOC LIBIOMP5

Networks and contestants as compare.py has them; what is not given is left out. The client is `quire bench serve` at
/v1/completions: --requests requests, 32 to 256 tokens in and 32 to 128 out, greedy, --streams of them at once, which is
llama-server's --parallel, too. Each round draws others, the same for all servers.

One server runs at a time, on 127.0.0.1, and is started for each sample, with the client beside it on the same
processors; with --keep they are started once, and wait for their turns. "Ready" is from its start to the first good
answer of /health. A sample is dropped, and counted, if others than these two took more than --others processors while
the client ran. Ratios say how many times as good Quire is.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.cpu import samples  # noqa: E402
from benchmarks.cpu.contestants import (  # noqa: E402
    PLAIN_TYPES,
    QUIRE_TYPES,
    Unusable,
    add_options,
    chosen,
    reason,
    vllm_environment,
)
from benchmarks.cpu.machine import Probe  # noqa: E402
from benchmarks.cpu.networks import GGUF_TYPES, gguf  # noqa: E402
from benchmarks.cpu.samples import Samples, in_turn  # noqa: E402
from quire.cli.prompts import LocalTokens, Maker  # noqa: E402
from quire.text.tokenizer import Tokenizer  # noqa: E402

QUIRE = (sys.executable, "-m", "quire.cli.main")
INPUTS, OUTPUTS = (32, 256), (32, 128)
MAX_LENGTH = 512
CACHE_BYTES = 2 * 2**30
START_S, END_S, PATIENCE_S = 600, 60, 3600
COLUMNS = {"output": "output_throughput", "TTFT p50": "median_ttft_ms", "TPOT p50": "median_tpot_ms"}
UNITS = {"output": "tok/s", "TTFT p50": "ms", "TPOT p50": "ms", "ready": "s"}


@dataclass(frozen=True, slots=True)
class Server:
    """`command` takes a network's name and a number of threads, and raises Unusable; a port is added to it."""

    name: str
    command: Callable[[str, int], list[str]]
    env: Callable[[int], dict[str, str]] = lambda threads: {}


def servers(args: argparse.Namespace) -> list[Server]:
    def quire(value: str, network: str, threads: int) -> list[str]:
        command = [*QUIRE, "serve", str(args.folder / network), "--dtype", "bfloat16"]
        command += ["--quantization", value, "--disable-log-stats", "--disable-access-log"]
        command += ["--num-threads", str(threads), "--max-model-len", str(MAX_LENGTH)]
        command += ["--max-queue-seconds", str(PATIENCE_S)]  # the others refuse nobody, either
        return [*command, "--kv-cache-memory-bytes", str(CACHE_BYTES)]

    def llama(kind: str, network: str, threads: int) -> list[str]:
        if args.llama_cpp is None:
            raise Unusable("--llama-cpp is not given")
        file = gguf(args.gguf or args.folder, network, kind)
        command = [str(args.llama_cpp / "bin" / "llama-server"), "-m", str(file), "-t", str(threads)]
        command += ["--parallel", str(args.streams), "-c", str(args.streams * MAX_LENGTH), "-fa", "on"]
        return [*command, "--no-webui", "--cache-ram", "0"]  # nothing comes twice: no copies of old prompts

    def vllm(dtype: str, network: str, threads: int) -> list[str]:
        if args.vllm is None:
            raise Unusable("--vllm is not given")
        module, folder = "vllm.entrypoints.openai.api_server", str(args.folder / network)
        command = [args.vllm, "-m", module, "--model", folder, "--dtype", dtype]
        return [*command, "--max-model-len", str(MAX_LENGTH), "--kv-cache-memory-bytes", str(CACHE_BYTES)]

    return [
        *(Server(f"Quire {kind}", partial(quire, value)) for kind, value in QUIRE_TYPES.items()),
        *(Server(f"llama.cpp {kind}", partial(llama, kind)) for kind in GGUF_TYPES),
        *(
            Server(f"vLLM {kind}", partial(vllm, value), partial(vllm_environment, args))
            for kind, value in PLAIN_TYPES.items()
        ),
    ]


class Running(NamedTuple):
    url: str
    pid: int
    ready_s: float


@contextmanager
def served(server: Server, network: str, threads: int) -> Iterator[Running]:
    """From when it is ready. Raises Unusable with what it said if it never is."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [*server.command(network, threads), "--host", "127.0.0.1", "--port", str(port)]
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"} | server.env(threads)
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        try:
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
        except OSError as error:
            raise Unusable(str(error)) from None
        try:
            while not is_ready(url):
                if (code := process.poll()) is not None:
                    log.seek(0)
                    raise Unusable(reason(code, log.read()))
                if time.perf_counter() - start > START_S:
                    raise Unusable(f"not ready after {START_S} s")
                time.sleep(0.05)
            yield Running(url, process.pid, time.perf_counter() - start)
        finally:
            process.terminate()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def write_requests(path: Path, folder: Path, count: int, seed: int) -> int:
    """Random words of exact lengths, with those of the outputs; returns the sum of these."""
    chance = random.Random(seed)
    maker = Maker(LocalTokens(Tokenizer.load(folder)), special=True)
    lengths = [(chance.randint(*INPUTS), chance.randint(*OUTPUTS)) for _ in range(count)]

    async def rows() -> list[dict[str, Any]]:
        return [{"prompt": await maker.text(i, chance), "output_tokens": o} for i, o in lengths]

    path.write_text("".join(json.dumps(row) + "\n" for row in asyncio.run(rows())))
    return sum(output for _, output in lengths)


def bench(running: Running, folder: Path, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """What `quire bench serve` found, if every token came."""
    with tempfile.TemporaryDirectory() as name:
        file, result = Path(name) / "requests.jsonl", Path(name) / "found.json"
        tokens = write_requests(file, folder, args.requests, seed)
        command = [*QUIRE, "bench", "serve", "--base-url", running.url, "--temperature", "0", "--ignore-eos"]
        command += ["--dataset-name", "custom", "--dataset-path", str(file), "--custom-output-len", "-1"]
        command += ["--num-prompts", str(args.requests), "--max-concurrency", str(args.streams)]
        command += ["--num-warmups", "2", "--disable-tqdm"]
        command += ["--save-result", "--result-dir", name, "--result-filename", result.name]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if ended.returncode:
            raise Unusable(reason(ended.returncode, ended.stdout + ended.stderr))
        found: dict[str, Any] = json.loads(result.read_text())
    if found["total_output_tokens"] != tokens:
        raise Unusable(f"{found['total_output_tokens']} tokens came, and {tokens} were asked for")
    return {measure: found[key] for measure, key in COLUMNS.items()} | {"ready": running.ready_s}


def rounds(
    found: Samples, them: Sequence[Server], network: str, threads: int, args: argparse.Namespace
) -> None:
    remaining, kept = {server.name: server for server in them}, dict[str, Running]()
    with ExitStack() as stack:
        for number in range(args.rounds):
            for name in in_turn([*remaining], number):
                try:
                    if args.keep and name not in kept:
                        kept[name] = stack.enter_context(served(remaining[name], network, threads))
                    of = nullcontext(kept[name]) if args.keep else served(remaining[name], network, threads)
                    with of as running:
                        run = partial(bench, running, args.folder / network, number, args)
                        found.take(name, number, run, running.pid)
                except Unusable as error:
                    print(f"- {name} is left out: {error}", flush=True)
                    del remaining[name]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    samples.add_options(parser)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--keep", action="store_true", help="Start each server once.")
    args = parser.parse_args()
    print(samples.machine())
    them = chosen(servers(args), args)
    for network in args.networks:
        for threads in args.threads:
            print(f"## {network}, {threads} thread{'s' * (threads > 1)}\n", flush=True)
            found = Samples(UNITS, Probe(threads), args.others, args.patience)
            try:
                rounds(found, them, network, threads, args)
            finally:  # an interrupt leaves what there is
                found.report([server.name for server in them])


if __name__ == "__main__":
    main()
