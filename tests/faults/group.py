"""The engine group with faults: in the steps of marked requests, or all the time. Only tests start it."""

import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quire.engine import group
from quire.engine.core import EngineCore
from quire.runner.fixed import Asked, FixedSteps
from quire.runner.runner import Runner
from quire.sampling.rules import read
from quire.sampling.sampler import Sampled, Sampler
from quire.scheduler.plan import Plan
from tests.faults.injection import Board, Fault, Injection, jumping_clock, read_mark

NO_TOKEN = 10**9


def main(sock: socket.socket) -> None:
    injection = Injection.read()
    board = Board(injection.board)
    board.set("pid", os.getpid())
    is_first = board.count("engines") == 1
    build, add = group.build_core, EngineCore.add

    def build_late(*args: Any, **options: Any) -> Any:
        time.sleep(injection.first_start_s if is_first else injection.other_starts_s)
        return build(*args, **options)

    def add_counted(self: EngineCore, submission: Any) -> None:
        board.count("adds")
        add(self, submission)

    group.build_core = build_late
    EngineCore.add = add_counted  # type: ignore[method-assign]
    Faults(injection, board).install()
    if injection.wrong_clock:
        time.time = jumping_clock(time.time)
    group.main(sock)


IN_SAMPLER = (Fault.RAISES, Fault.BIAS, Fault.NAN)


class Faults:
    """What befalls the steps. `active` are the marked sequences that a step meets their faults with, by slot."""

    def __init__(self, injection: Injection, board: Board):
        self.injection, self.board, self.num_steps = injection, board, 0
        self.marks: dict[int, tuple[Fault, int]] = {}  # by sequence
        self.prompt_len: dict[int, int] = {}
        self.active: dict[int, Fault] = {}

    def install(self) -> None:
        launch, sample, admit, asked = Runner.launch, Sampler.sample, Sampler.admit, FixedSteps.asked

        def launch_with_faults(runner: Runner, plan: Plan) -> None:
            self.before(plan)
            launch(runner, plan)

        def sample_with_faults(sampler: Sampler, logits: Tensor, slots: Any, *args: Any) -> Sampled:
            self.spoil(sampler, logits, slots)
            return sample(sampler, logits, slots, *args)

        def admit_with_faults(sampler: Sampler, slot: int, *args: Any, **options: Any) -> None:
            if self.active.get(slot) is Fault.SETUP:
                raise RuntimeError("a fault was asked for")
            admit(sampler, slot, *args, **options)

        def asked_with_faults(fixed: FixedSteps, slots: Sequence[int]) -> Asked | None:
            """What fails in the sampler is not drawn by a recorded step."""
            is_failing = any(self.active.get(slot) in IN_SAMPLER for slot in slots)
            return None if is_failing else asked(fixed, slots)

        FixedSteps.asked = asked_with_faults  # type: ignore[method-assign]
        Runner.launch = launch_with_faults  # type: ignore[method-assign]
        Sampler.sample = sample_with_faults  # type: ignore[method-assign]
        Sampler.admit = admit_with_faults  # type: ignore[method-assign]

    def before(self, plan: Plan) -> None:
        """What happens before a step is computed."""
        self.num_steps += 1
        self.board.count("steps")
        time.sleep(self.injection.step_s)
        if self.num_steps == self.injection.dies_at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        for start in plan.starts:
            mark = read_mark(start.tokens[: start.prompt_len])
            self.prompt_len[start.seq] = start.prompt_len
            if mark is not None:
                self.marks[start.seq] = mark
        self.active = {}
        for work in plan.work:
            fault, at = self.marks.get(work.seq, (None, 0))
            if fault is not None and work.start + work.count - self.prompt_len[work.seq] >= at:
                self.active[work.slot] = fault
        for fault in self.active.values():
            _strike(fault)

    def spoil(self, sampler: Sampler, logits: Tensor, slots: Any) -> None:
        """What happens to rows of the sampler."""
        for row, slot in enumerate(slots):
            match self.active.get(slot):
                case Fault.RAISES:
                    raise RuntimeError("a fault was asked for")
                case Fault.BIAS:
                    record = sampler._params.kept.rules.of[slot]
                    assert record is not None
                    read(record)[1].added.fill_(NO_TOKEN)
                case Fault.NAN:
                    logits[row] = torch.nan


def _strike(fault: Fault) -> None:
    match fault:
        case Fault.KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        case Fault.STOPPED:
            os.kill(os.getpid(), signal.SIGSTOP)
        case Fault.EXITS:
            os._exit(3)
        case Fault.ABORTS:
            os.abort()
        case Fault.HANGS:
            threading.Event().wait()
