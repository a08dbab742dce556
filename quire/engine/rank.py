"""The life of a rank other than the first: it computes its part of every step that it is told, and plans nothing.

It answers when it is about to connect with the others and when it is ready, and ends when rank 0's end of the socket
closes. What it samples nobody needs to hear: all ranks that sample have the same logits, and draw the same tokens from
them. Only where these are the last of several stages, one of them says what it was.
"""

import logging
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import TCPStore

from quire.config import Config
from quire.engine.device import backend_of, find, make_runner, platform_of, world_of
from quire.engine.processes import hang_up
from quire.engine.wire import Channel, Failed, Message, WireError
from quire.errors import EngineDead, QuireError
from quire.log import logger
from quire.parallel.factory import Rendezvous, communicators
from quire.resolve import Memory
from quire.runner.runner import Runner, Sampling
from quire.scheduler.plan import Plan, Result
from quire.types import Grammar, TokenLogprobs

CONNECT_S = 60.0
REFUSED = 2  # exit code of a rank that rank 0 does not want


@dataclass(frozen=True, slots=True)
class Seat:
    """What a rank has of its machine.

    Attributes:
        index: which of the GPUs that are visible on the machine is its own.
        beside: ranks of the machine that share memory, itself among them.
        segment: a descriptor of that memory, if there is any.
    """

    index: int
    beside: range
    segment: int | None = None


class Join(Message, frozen=True):
    """First to a rank: which one it is, and what rank 0 decided for all."""

    rank: int
    options: dict[str, Any]  # every field of `Config`, derived ones filled in
    memory: Memory
    host: str  # rank 0's address
    port: int | None  # of its store there; None if none is needed


class Here(Message, frozen=True):
    """The rank has found the model and its device, and is about to connect with the others."""


class Joined(Message, frozen=True):
    """The rank has its weights and its cache."""


class Step(Message, frozen=True):
    """What to do, in this order: sequences to know, sequences to forget, a plan to carry out. `grammars` come later.

    Of groups in lockstep, `most_rows` is the most tokens that one has in the step, in which this may have none.
    """

    new: list[tuple[int, Sampling]]
    gone: list[int]
    plan: Plan
    most_rows: int = 0
    grammars: list[Grammar] = []


class Sampled(Message, frozen=True):
    """What a step brought, of sequences that are still known."""

    result: Result
    logprobs: dict[int, list[TokenLogprobs]]  # by sequence
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]]


ToRank = Join | Step | Failed
FromRank = Here | Joined | Failed | Sampled


def main(index: str, beside: str, sock: str, segment: str = "") -> None:
    """The life of a process that is started for it: what a `Seat` is made of, and descriptors."""
    seat = Seat(int(index), range(int(beside)), int(segment) if segment else None)
    serve(socket.socket(fileno=int(sock)), seat)


def serve(sock: socket.socket, seat: Seat, parent: socket.socket | None = None) -> None:
    """Join rank 0, then obey it, until its end of the socket closes, or the parent's of another one."""
    for number in (signal.SIGINT, signal.SIGTERM):  # rank 0's to handle
        signal.signal(number, signal.SIG_IGN)
    ends = [end.fileno() for end in (sock, parent) if end is not None]
    threading.Thread(target=_end_with, args=(ends,), name="quire-watch", daemon=True).start()
    if logger.level == logging.INFO:  # rank 0 says the same
        logger.setLevel(logging.WARNING)
    channel = Channel(sock, incoming=ToRank)
    try:
        worker = _join(channel, seat)
        if worker is not None:
            worker.run()
    except EngineDead:
        pass  # rank 0 is gone
    except Exception:
        logger.exception("a rank stopped")
        os._exit(1)  # at once: rank 0 sees that


def _end_with(descriptors: list[int]) -> None:
    hang_up(descriptors)
    os._exit(0)


def _join(channel: Channel, seat: Seat) -> "Worker | None":
    """Get ready; None if that is not possible, which rank 0 has been told."""
    message = channel.receive(None)
    if isinstance(message, Failed):
        logger.error("rank 0 says: %s", message.message)
        os._exit(REFUSED)
    if not isinstance(message, Join):
        raise WireError(f"the first message is a {type(message).__name__}; it must be a Join")
    try:
        runner = _runner(message, channel, seat)
        axes, ahead = runner.model.axes, int(bool(message.options["async_scheduling"]))
        answers = runner.samples and axes.pp.size > 1 and axes.tp.rank == axes.cp.rank == 0
        worker = Worker(channel, runner, ahead=ahead if answers else None)
    except QuireError as error:
        channel.send(Failed(type(error).__name__, f"rank {message.rank}: {error}"))
        return None
    except torch.OutOfMemoryError as error:
        channel.send(Failed("CapacityError", f"rank {message.rank} has less memory than rank 0: {error}"))
        return None
    channel.send(Joined())
    return worker


def _runner(join: Join, channel: Channel, seat: Seat) -> Runner:
    config = Config.of(**join.options)
    found, platform = find(config), platform_of(config, seat.index)
    channel.send(Here())
    store = join.port and TCPStore(join.host, join.port, None, False, timedelta(seconds=CONNECT_S))
    ours = channel.sock.family != socket.AF_UNIX  # that faces rank 0's machine
    place = Rendezvous(
        store or None,
        host=channel.sock.getsockname()[0] if ours else join.host,
        segment=seat.segment,
        local=tuple(seat.beside),
    )
    axes = communicators(world_of(config), join.rank, place, platform.device)
    backend = backend_of(config, platform, config.dtype)
    return make_runner(found, config, join.memory, platform, backend, axes)


class Worker:
    """Carries out steps as they are told."""

    def __init__(self, channel: Channel, runner: Runner, *, ahead: int | None):
        """`ahead`: steps that are begun before the oldest one's outcome is waited for and told; None: it is not told.

        A device that computes while the host goes on is given the next step first. On any other, which would wait in
        that for an earlier stage, the outcome is there.
        """
        self.channel, self.runner, self.ahead = channel, runner, ahead
        self.untold: deque[tuple[Plan, Callable[[], Result]]] = deque()

    def run(self) -> None:
        """Until rank 0 is gone.

        Raises:
            EngineDead: it is.
        """
        while True:
            step = self.channel.receive(0.0 if self.untold else None)
            if step is not None:
                self._carry_out(step)
            while len(self.untold) > (self.ahead or 0) * (step is not None):
                self._tell(*self.untold.popleft())

    def _carry_out(self, step: Step) -> None:
        runner, plan = self.runner, step.plan
        for grammar in step.grammars:
            runner.prepare(grammar)
        for seq, sampling in step.new:
            runner.register(seq, sampling)
        for seq in step.gone:
            runner.forget(seq)
        runner.expect(step.most_rows)
        runner.launch(plan)
        if plan.work and runner.samples:
            result = runner.sample(plan)
            if self.ahead is not None:
                self.untold.append((plan, result))
        elif step.most_rows and not plan.work:
            runner.idle()

    def _tell(self, plan: Plan, wait: Callable[[], Result]) -> None:
        runner, result = self.runner, wait()
        logprobs: dict[int, list[TokenLogprobs]] = {}
        prompts: dict[int, tuple[TokenLogprobs, ...]] = {}
        for seq in (w.seq for w in plan.work if w.samples and w.seq in runner.sampling):
            if scores := runner.logprobs[seq]:
                logprobs[seq] = list(scores)
                scores.clear()
            if (prompt := runner.take_prompt_logprobs(seq)) is not None:
                prompts[seq] = prompt
        self.channel.send(Sampled(result, logprobs, prompts))
