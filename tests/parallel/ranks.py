"""Ranks for tests: forked from one process that has loaded torch and has no threads, since loading it takes seconds."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LIMIT_S = 60.0  # for all ranks of a run; none of them is to need it


class Ranks:
    """The handle on that process. `entry` is a module whose functions, called (rank, args), are what ranks do."""

    def __init__(self, entry: str):
        command = [sys.executable, "-m", "tests.parallel.ranks", entry]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, name: str, size: int, **args: Any) -> list[str]:
        """What each of `size` ranks said that did entry.name(rank, args), or how it ended.

        These arguments are given to them with their number, a store's file, and the descriptors of two segments.
        """
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps([name, size, args]) + "\n")
        stdin.flush()
        found: list[str] = json.loads(stdout.readline())
        return found

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def main(entry: str) -> None:
    import importlib

    import torch

    from quire.parallel.shared_memory import make_segment

    torch.set_num_threads(1)
    module = importlib.import_module(entry)
    for line in sys.stdin:
        name, size, args = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            segments = [make_segment(), make_segment()]
            args |= {"store": f"{folder}/store", "segment": segments[0], "other": segments[1], "size": size}
            watch = getattr(module, f"watch_{name}", None)
            found = run(getattr(module, name), args, watch)
            for segment in segments:
                os.close(segment)
        print(json.dumps(found), flush=True)


def run(life: Callable[..., str], args: dict[str, Any], watch: Callable[..., None] | None) -> list[str]:
    """Fork the ranks, and say how each ended. `watch` is called with the first one that dies of a signal."""
    answers, pids = [], []
    for rank in range(args["size"]):
        answer, theirs = os.pipe()
        pids.append(os.fork())
        if not pids[-1]:
            live(life, rank, args, theirs)
        os.close(theirs)
        answers.append(answer)
    said, until = dict.fromkeys(answers, b""), time.monotonic() + LIMIT_S
    waiting = set(answers)
    while waiting and (left := until - time.monotonic()) > 0:
        for answer in select.select(waiting, [], [], left)[0]:
            if data := os.read(answer, 1 << 16):
                said[answer] += data
                continue
            waiting.discard(answer)
            if not said[answer] and watch is not None:
                watch(args)
        left_over = [pids[answers.index(answer)] for answer in waiting]
        if all(map(is_stopped, left_over)):
            for pid in left_over:
                os.kill(pid, signal.SIGKILL)
    for answer in waiting:
        os.kill(pids[answers.index(answer)], signal.SIGKILL)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    for answer in answers:
        os.close(answer)
    return [ending(said[a], status, a in waiting) for a, status in zip(answers, statuses, strict=True)]


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def ending(said: bytes, status: int, was_waiting: bool) -> str:
    return "hung" if was_waiting else said.decode() or f"ended with {status}"


def live(life: Callable[..., str], rank: int, args: dict[str, Any], answer: int) -> None:
    """The child; does not return."""
    status = 1
    try:
        said = life(rank, args)
        status = 0
    except BaseException:
        said = traceback.format_exc()
    os.write(answer, said.encode()[-60000:])
    os._exit(status)


def expect(found: Sequence[str], wanted: str) -> None:
    assert list(found) == [wanted] * len(found), "\n".join(found)


if __name__ == "__main__":
    main(sys.argv[1])
