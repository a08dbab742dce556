"""Kernels compiled in processes of their own while weights load, into Triton's cache on disk.

Which kernels steps will need is not written down anywhere: each process runs the steps themselves, on `meta` tensors
and for a GPU that is described, with a driver for Triton that launches nothing. All of them run the same steps, and
each compiles its share of the kernels that come by. Nothing depends on it: what is not compiled when it is first
launched is compiled then.
"""

import atexit
import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import os
import pkgutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quire
from quire.attention.shapes import block_bytes
from quire.attention.states import state_bytes
from quire.attention.triton.backend import Triton
from quire.checkpoint.dummy import MetaWeights
from quire.engine.processes import command
from quire.kernels.gpu import Gpu
from quire.layers.decoder import Decoder
from quire.log import logger
from quire.models.registry import decoder_spec
from quire.models.spec import Decoder as DecoderSpec
from quire.runner.fixed import FEW_ROWS, SHORT, FixedKind, FixedSteps
from quire.runner.graphs import Graphs
from quire.runner.mixed import MixedKind, MixedSteps, worthwhile
from quire.runner.state import SlotState
from quire.sampling.sampler import EXTRAS, Sampler
from quire.sampling.slots import Uses

MAX_PROCESSES = 16
NICENESS = 10  # weights come first
KERNELS = ("quire.attention.triton", "quire.kernels.triton", "quire.runner.triton", "quire.sampling.triton")
ANY_DRAW = Uses.RANDOM | Uses.FILTERS
DRAWS = (Uses(0), Uses.RANDOM, ANY_DRAW, ANY_DRAW | EXTRAS | Uses.LOGPROBS)  # every kernel that draws


@dataclass(frozen=True)
class Job:
    """What a model's launches depend on, in words that JSON has."""

    raw: Mapping[str, Any]  # config.json
    dtype: str
    block_size: int
    max_seqs: int
    max_length: int
    max_batched_tokens: int
    gpu: tuple[int, int, tuple[int, int]]
    invariant: bool = False
    share: int = 0  # of `num_shares`
    num_shares: int = 1


def compiled(job: Job, folder: Path) -> Path:
    """The file in the kernels' `folder` that is there when all of the job's kernels are."""
    package = Path(quire.__file__).parent
    sources = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in package.rglob("*.py")]
    versions = [importlib.metadata.version(name) for name in ("torch", "triton")]
    words = json.dumps([asdict(job), sorted(sources), versions])
    return folder / f"quire-{hashlib.blake2b(words.encode(), digest_size=16).hexdigest()}"


class Precompiler:
    """The processes of one engine."""

    def __init__(self, job: Job, done: Path | None = None, num_processes: int | None = None):
        """`done`: a file to make when all kernels are compiled."""
        self.done = done
        count = num_processes or max(1, min(len(os.sched_getaffinity(0)) - 1, MAX_PROCESSES))
        self.processes: list[subprocess.Popen[bytes]] = []
        for share in range(count):
            work = json.dumps({**asdict(job), "share": share, "num_shares": count})
            try:
                process = subprocess.Popen(
                    command(__name__),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=None if share == 0 else subprocess.DEVNULL,  # all would say the same
                )
                self.processes.append(process)
                if process.stdin is not None:
                    with process.stdin as stdin:
                        stdin.write(work.encode())
            except OSError as error:
                logger.warning("no process to compile kernels: %s; first uses will be slower", error)
                break
        atexit.register(self.close)
        self.watcher = threading.Thread(target=self._watch, name="quire-precompile", daemon=True)
        self.watcher.start()

    def wait(self) -> list[int]:
        """Wait for the end of all; returns their exit codes."""
        return [process.wait() for process in self.processes]

    def close(self) -> None:
        """End those that still run."""
        atexit.unregister(self.close)
        for process in self.processes:
            process.kill()
        self.wait()

    def _watch(self) -> None:
        codes = self.wait()
        atexit.unregister(self.close)
        if failed := [code for code in codes if code > 0]:  # less than 0: killed, as by `close`
            logger.warning("%d processes could not compile kernels; first uses will be slower", len(failed))
        if self.done is not None and codes and not any(codes):
            with contextlib.suppress(OSError):  # then the next engine looks again
                self.done.touch()


@dataclass
class Outcome:
    """Kernels' names by digest, those that steps launch and those of this share; and which were in no cache."""

    launched: dict[str, str] = field(default_factory=dict)
    mine: dict[str, str] = field(default_factory=dict)
    num_compiled: int = 0


def run(job: Job) -> Outcome:
    """Compile the job's share. For a process that does nothing else: Triton has another driver afterwards."""
    from triton import knobs

    from quire.kernels.triton import mixture, ops, products, states  # noqa: F401  # torch may be one without CUDA
    from quire.kernels.triton.described import compile_only

    gpu = Gpu(job.gpu[0], job.gpu[1], (job.gpu[2][0], job.gpu[2][1]))
    compile_only(gpu)
    fix_keys()
    outcome, parent = Outcome(), os.getppid()

    def count(*, cache_hit: bool, **_: object) -> None:
        outcome.num_compiled += not cache_hit

    def skip(*, key: str, fn: Any, **_: object) -> bool:
        """Triton asks before it compiles; True is no."""
        if os.getppid() != parent:
            raise SystemExit(0)  # nobody is left to compile for
        digest = hashlib.blake2b(f"{fn.module}.{fn.name}{key}".encode(), digest_size=8).hexdigest()
        outcome.launched[digest] = fn.name
        if int(digest, 16) % job.num_shares != job.share:
            return True
        outcome.mine[digest] = fn.name
        return False

    knobs.runtime.jit_cache_hook, knobs.compilation.listener = skip, count
    dry_run(job)
    return outcome


def fix_keys() -> None:
    """Have Triton know kernels by the same keys in every process, whatever each of them compiles first.

    A kernel's key holds the constants of the functions that it calls, but only if those have been hashed before it
    (Triton 3.6). Kernels that others compiled would not be found.
    """
    for package in map(importlib.import_module, KERNELS):
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            for value in vars(importlib.import_module(found.name)).values():
                _hash(value)


def _hash(function: object) -> None:
    """A function of Triton's, after those that it calls."""
    from triton import JITFunction

    if isinstance(function, JITFunction) and function.hash is None:
        for name in function.fn.__code__.co_names:
            _hash(function.fn.__globals__.get(name))
        function.cache_key  # noqa: B018  # which is computed when it is read


def dry_run(job: Job) -> None:
    """Every kind of decode step, and of small steps with prompts, on `meta` tensors. Graphs of them come later."""
    spec, _ = decoder_spec(dict(job.raw))
    device, dtype = torch.device("meta"), getattr(torch, job.dtype)
    model = Decoder(
        spec,
        backend=Triton(job.block_size, job.invariant),
        dtype=dtype,
        device=device,
        max_length=job.max_length,
        invariant=job.invariant,
    )
    pool = torch.empty(
        1024, block_bytes(spec, job.block_size, dtype.itemsize), dtype=torch.uint8, device=device
    )
    states = torch.empty(
        job.max_seqs + 1, state_bytes(spec, dtype.itemsize), dtype=torch.uint8, device=device
    )
    caches, kept = model.caches(pool, states), distinct_layers(spec)
    model.layers = nn.ModuleList(model.layers[i] for i in kept)
    model.load(MetaWeights(dtype))
    state = SlotState(job.max_seqs, job.max_length, job.block_size, device)
    fixed = FixedSteps(
        model,
        [caches[i] for i in kept],
        state,
        Sampler(model.vocabulary, state.tokens),
        block_size=job.block_size,
        graphs=Graphs(capture=False),
    )
    mixed = MixedSteps(fixed, min(job.max_batched_tokens, worthwhile(spec)))
    for kind in mixed_kinds(mixed):
        mixed.compute(kind)
    for fixed_kind in fixed_kinds(fixed):
        fixed.compute(fixed_kind)


def distinct_layers(spec: DecoderSpec) -> list[int]:
    """Indices of layers with what comes after them: others launch the same kernels."""
    blocks = spec.blocks
    pairs = list(zip(blocks, (*blocks[1:], None), strict=True))
    firsts = {
        pairs.index(pair) for pair in pairs
    }  # specs can be compared, not hashed: ropes hold dictionaries
    return sorted({i for first in firsts for i in (first, min(first + 1, len(blocks) - 1))})


def fixed_kinds(steps: FixedSteps) -> Iterator[FixedKind]:
    longest = steps.state.max_length
    for num_rows, uses in product(steps.sizes, DRAWS):
        lengths = {longest, min(longest, SHORT)} if num_rows <= FEW_ROWS else {longest}
        for length, shares in product(sorted(lengths), (False, True)):
            if not shares or steps.rows.shared is not None and num_rows > 1:
                yield FixedKind(num_rows, length, uses, shares)


def mixed_kinds(steps: MixedSteps) -> Iterator[MixedKind]:
    for num_tokens, num_seqs in product(steps.token_sizes, steps.seq_sizes):
        if num_seqs <= num_tokens:
            for mixed in (False, True)[: 1 + (num_seqs > 1)]:
                yield MixedKind(num_tokens, num_seqs, mixed, Uses(0))


def main() -> None:
    """A process: a job on its standard input, the outcome on its standard output."""
    os.nice(NICENESS)
    torch.set_num_threads(1)
    outcome = run(Job(**json.load(sys.stdin)))
    sys.stdout.write(json.dumps(asdict(outcome)))
