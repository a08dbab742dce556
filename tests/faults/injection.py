"""What goes wrong in a server under test, and what its processes let a test see. Only tests use it.

A request is marked by the first tokens of its prompt: it names its fault, and when it strikes.
"""

import dataclasses
import json
import mmap
import os
import random
import struct
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

VARIABLE = "FAULTS"  # in the environment of the processes: an `Injection` as JSON
MARK = (3333, 3331, 3333)  # what no other prompt of these tests begins with
ZERO = 100  # the token id that stands for "at once"


class Fault(IntEnum):
    """What happens in a step that a marked request takes part in. The value is a token id."""

    KILLED = 11  # by SIGKILL
    EXITS = 12
    ABORTS = 13  # as from an assertion in native code
    HANGS = 14
    STOPPED = 15  # by SIGSTOP
    RAISES = 16  # in the sampler
    BIAS = 17  # its logit bias names a token that is not there
    SETUP = 18  # its parameters cannot be set up
    NAN = 19  # in its row of logits


def marked(fault: Fault, at: int = 0) -> list[int]:
    """A prompt whose request meets a fault as soon as it has `at` output tokens."""
    return [*MARK, fault, ZERO + at, 511, 263, 77]


def read_mark(prompt: tuple[int, ...]) -> tuple[Fault, int] | None:
    """The fault of a prompt, and the number of output tokens that it waits for."""
    if prompt[: len(MARK)] != MARK:
        return None
    return Fault(prompt[len(MARK)]), prompt[len(MARK) + 1] - ZERO


@dataclasses.dataclass(frozen=True)
class Injection:
    """How a server under test differs from one in service, whatever is asked of it."""

    board: str  # the file of a `Board`
    dies_at_step: int | None = None  # every engine, at its n-th step
    first_start_s: float = 0.0  # how much longer the first engine takes to start
    other_starts_s: float = 0.0  # and those that replace it
    step_s: float = 0.0  # how much longer every step takes
    wrong_clock: bool = False  # the wall clock jumps by years at each look
    hang_s: float = 10.0  # silence that counts as a hang
    stall_s: float = 60.0  # until a client must have taken what it was sent

    @classmethod
    def read(cls) -> "Injection":
        return cls(**json.loads(os.environ[VARIABLE]))

    def environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(dataclasses.asdict(self))}


class Board:
    """A few counters in a file that the processes of a server write and a test reads."""

    SLOTS = ("pid", "engines", "adds", "steps", "tasks", "reports")
    SIZE = 8 * len(SLOTS)

    def __init__(self, path: str | Path):
        path = Path(path)
        if not path.exists():
            path.write_bytes(bytes(self.SIZE))
        with path.open("r+b") as file:
            self.memory = mmap.mmap(file.fileno(), self.SIZE)

    def get(self, name: str) -> int:
        return int(struct.unpack_from("q", self.memory, 8 * self.SLOTS.index(name))[0])

    def set(self, name: str, value: int) -> None:
        struct.pack_into("q", self.memory, 8 * self.SLOTS.index(name), value)

    def count(self, name: str) -> int:
        self.set(name, value := self.get(name) + 1)
        return value


def jumping_clock(true: Callable[[], float]) -> Callable[[], float]:
    """A wall clock that is up to ten years off, another way at each look."""
    draw = random.Random(0)
    return lambda: true() + draw.uniform(-3e8, 3e8)
