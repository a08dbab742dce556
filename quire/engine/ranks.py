"""Rank 0's hold on the other ranks of its group: starts them, tells each step to all, notices when one is gone.

They live and die together. A group's ranks are forked; those of an engine in the caller's process, which may have
threads or have used a GPU, are started afresh. Those of other machines come by themselves (`engine/meeting.py`).
"""

import os
import socket
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch.distributed import TCPStore

from quire.config import Config
from quire.engine.device import is_placed, mesh_of, world_of
from quire.engine.meeting import GATHER_S, Meeting
from quire.engine.placement import Placement, place
from quire.engine.processes import command, hang_up, live
from quire.engine.rank import CONNECT_S, FromRank, Join, Sampled, Seat, Step, serve
from quire.engine.site import secret_of, site_of
from quire.engine.ticks import Post
from quire.engine.wire import Channel, Failed, WireError, error_of
from quire.errors import ConfigError, EngineDead, PeerLost
from quire.log import logger
from quire.parallel import shared_memory
from quire.parallel.axis import Axes
from quire.parallel.factory import Rendezvous, communicators
from quire.parallel.mesh import Mesh
from quire.resolve import Memory
from quire.runner.runner import Runner, Sampling
from quire.scheduler.plan import Plan, Result
from quire.types import Grammar, TokenLogprobs

RANK = "quire.engine.rank"
LOOPBACK = "127.0.0.1"
PATIENCE_S = 5.0  # for processes that end
NOTHING = Plan(step=0, work=())


class Ranks:
    """All ranks but the first, from their start to their end.

    Attributes:
        pids: their process ids.
        ends: what `close` has to undo.
    """

    def __init__(
        self,
        mesh: Mesh,
        seat: Seat,
        channels: Sequence[Channel],
        pids: Sequence[int],
        *,
        host: str = LOOPBACK,
        processes: Sequence["subprocess.Popen[bytes]"] = (),
        placement: Placement | None = None,
        essential: bool = False,
        post: Post | None = None,
    ):
        """
        Args:
            seat: that of rank 0.
            channels: to all others, in their order.
            pids: of those that are on this machine.
            host: this machine's address, as the ranks of others know it.
            processes: those that are to be waited for.
            placement: what Ray gave for others.
            essential: a lost rank is the end of this process, whose parent sees to all of them.
            post: of a group that computes in lockstep with others; the mesh is of all of these then.
        """
        self.post, self.first = post, 0 if post is None else post.number * (len(channels) + 1)
        self.mesh, self.seat, self.channels, self.pids = mesh, seat, channels, pids
        self.host, self.processes, self.essential = host, processes, essential
        self.store: TCPStore | None = None
        self.poison: Callable[[], None] = lambda: None
        self.threads: list[threading.Thread] = []  # once all are ready
        self.answers: SimpleQueue[Sampled | None] = SimpleQueue()  # None: there are no more
        self.closed, self.ends = False, ExitStack()
        if placement is not None:
            self.ends.callback(placement.close)
        if seat.segment is not None:
            self.ends.callback(os.close, seat.segment)

    def join(self, config: Config, memories: Sequence[Memory], device: torch.device) -> Axes:
        """Tell all ranks what was decided, for each stage's, and connect with them; returns what they share.

        Raises:
            ConfigError, ModelError, CapacityError, EngineDead: see `wait`.
        """
        port, segment, beside = None, self.seat.segment, self.seat.beside
        shares = device.type == "cpu" and segment is not None and shared_memory.why_not(self.mesh) is None
        if not shares or len(beside) < self.mesh.size:
            port = self._open_store() if self.first == 0 else self._find_store()
        if shares and segment is not None:
            self.poison = shared_memory.Segment(segment, self.mesh, beside).poison
        for rank, channel in enumerate(self.channels, self.first + 1):
            memory = memories[self.mesh.coordinates(rank).pp]
            channel.send(Join(rank, dict(vars(config)), memory, self.host, port))
        if port is not None:  # whoever cannot come is not waited for
            self._hear()
        place = Rendezvous(self.store, host=self.host, segment=segment, local=tuple(beside))
        return communicators(self.mesh, self.first, place, device)

    def turn(self, num_rows: int) -> int:
        """See `Line.turn`."""
        return num_rows if self.post is None else self.post.line.turn(num_rows)

    def wait(self) -> None:
        """Until all are ready; from then on they are watched.

        Raises:
            ConfigError, ModelError, CapacityError: what a rank could not do.
            EngineDead: one ended.
        """
        if self.store is None:
            self._hear()
        self._hear()
        if not self.channels:
            return
        self.threads.append(threading.Thread(target=self._watch, name="quire-ranks", daemon=True))
        if self.mesh.pp > 1:
            self.threads.append(threading.Thread(target=self._listen, name="quire-answers", daemon=True))
        for thread in self.threads:
            thread.start()

    def _hear(self) -> None:
        """An answer of each."""
        for rank, channel in enumerate(self.channels, self.first + 1):
            try:
                message = channel.receive(None)
            except EngineDead:
                raise EngineDead(
                    f"rank {rank} of {self.mesh.size} died while it started; see the log"
                ) from None
            if isinstance(message, Failed):
                raise error_of(message.kind, message.message)

    def answer(self) -> Sampled:
        """What the oldest step brought of which that was not asked for yet. Only of several stages.

        Raises:
            PeerLost: the rank that would say it is gone.
        """
        answer = self.answers.get()
        if answer is None:
            self.answers.put(None)  # whoever asks again
            raise PeerLost("the rank that samples is gone")
        return answer

    def send(self, step: Step) -> None:
        """To all of them.

        Raises:
            PeerLost: one is gone.
        """
        data = self.channels[0].encode(step) if self.channels else b""
        try:
            for channel in self.channels:
                channel.sock.sendall(data)
        except OSError as error:
            raise PeerLost(f"another rank of this one's group is gone ({error.strerror})") from None

    def close(self) -> None:
        """End all ranks, and wait for that where nobody else does."""
        if self.closed:
            return
        self.closed = True
        for channel in self.channels:  # not just closed: who polls it would keep it open
            with suppress(OSError):  # it may be gone
                channel.sock.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join()
        for channel in self.channels:
            channel.sock.close()
        self.ends.close()
        for process in self.processes:
            if not self.threads:  # it may be loading modules still, and would notice only after that
                process.kill()
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _open_store(self) -> int:
        """Through which ranks find each other; at the address only at which they meet."""
        family = socket.getaddrinfo(self.host, 0, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((self.host, 0), family=family)
        port: int = listening.getsockname()[1]
        self.store = TCPStore(
            self.host,
            port,
            None,
            True,
            timedelta(seconds=CONNECT_S),
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )
        if self.post is not None:
            self.post.line.meet(port)
        return port

    def _find_store(self) -> int:
        """That of the group that leads."""
        port = 0 if self.post is None else self.post.line.meet()
        self.store = TCPStore(self.host, port, None, False, timedelta(seconds=CONNECT_S))
        return port

    def _listen(self) -> None:
        """Take answers as they come, so that nobody waits in vain for a rank that waits for room for one."""
        rank = self.mesh.rank(self.mesh.coordinates(self.first)._replace(pp=self.mesh.pp - 1))
        try:
            while True:
                self.answers.put(self.channels[rank - self.first - 1].receive(None))
        except (EngineDead, WireError):
            self.answers.put(None)

    def _watch(self) -> None:
        hang_up([channel.sock.fileno() for channel in self.channels])
        if self.closed:
            return
        logger.error("a rank of this engine died")
        if self.essential:
            os._exit(1)  # at once, wherever this one waits for it
        self.poison()


def fork(config: Config, *others: socket.socket, post: Post | None = None, group: int = 0) -> Ranks | None:
    """All other ranks of a process that has done nothing yet that a fork would not survive.

    `others`: its open sockets, which are not for them. `post`: of one among several groups in lockstep. `group`: which
    of several independent groups it is.

    Raises:
        ConfigError: ranks cannot be shared out as asked, or no rank can come to this machine.
        PeerLost: not all came.
    """
    mesh, world = mesh_of(config), world_of(config)
    seat = seat_of(config, group) if post is None else seat_at(post, mesh.size, world.size)
    if world.size == 1:
        return None
    pids, channels = list[int](), list[Channel]()
    for rank in seat.beside[1 : mesh.size]:
        its = replace(seat, index=seat.index + rank)
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if not pid:
            for sock in (*others, ours, *(channel.sock for channel in channels)):
                sock.close()  # or it would not be closed when this process ends
            live(partial(serve, seat=its), theirs)
        theirs.close()
        pids.append(pid)
        channels.append(Channel(ours, incoming=FromRank))
    host, placement = (LOOPBACK, None) if post is not None else _gather(config, mesh, seat, channels)
    return Ranks(world, seat, channels, pids, host=host, placement=placement, essential=True, post=post)


def spawn(config: Config) -> Ranks | None:
    """All other ranks, as processes of their own, whatever this one is like.

    Raises:
        ConfigError, PeerLost: see `fork`.
    """
    mesh, seat = mesh_of(config), seat_of(config)
    if mesh.size == 1:
        return None
    processes, channels = list["subprocess.Popen[bytes]"](), list[Channel]()
    for rank in seat.beside[1:]:
        ours, theirs = socket.socketpair()
        channels.append(Channel(ours, incoming=FromRank))
        with theirs:
            given = [theirs.fileno()] if seat.segment is None else [theirs.fileno(), seat.segment]
            words = command(RANK, str(seat.index + rank), str(len(seat.beside)), *map(str, given))
            processes.append(subprocess.Popen(words, pass_fds=given, stdin=subprocess.DEVNULL))
    pids = [process.pid for process in processes]
    host, placement = _gather(config, mesh, seat, channels)
    return Ranks(mesh, seat, channels, pids, host=host, processes=processes, placement=placement)


def seat_of(config: Config, group: int = 0) -> Seat:
    """Rank 0's, of one among groups that follow each other on this machine's GPUs."""
    site, placed, size = site_of(config), is_placed(config), mesh_of(config).size
    if site.process:
        raise ConfigError(
            f"process {site.process} of {site.num_processes} has ranks of an engine that is elsewhere; start it with"
            " quire serve"
        )
    beside = range(1) if placed else site.ranks(size)
    shares = len(beside) > 1 and sys.platform == "linux"
    return Seat(
        0 if placed else group * size + site.index * len(beside),
        beside,
        shared_memory.make_segment() if shares else None,
    )


def seat_at(post: Post, num_ranks: int, num_all: int) -> Seat:
    """That of the first rank of a group of `num_ranks`, all groups being on one machine."""
    return Seat(post.number * num_ranks, range(num_all), post.segment)


def _gather(config: Config, mesh: Mesh, seat: Seat, channels: list[Channel]) -> tuple[str, Placement | None]:
    """Add the ranks that come by themselves; returns this machine's address, as they know it, and what Ray gave."""
    if len(seat.beside) == mesh.size:
        return LOOPBACK, None
    site, ranks, placement = site_of(config), range(len(seat.beside), mesh.size), None
    if config.distributed_executor_backend == "ray":
        placement, meeting = place(config, mesh.size)
    else:
        meeting = Meeting((site.address, site.port), secret_of(config))
    host, port = meeting.address
    logger.info("waiting at %s:%d for ranks %d to %d of %d", host, port, ranks[0], ranks[-1], mesh.size)
    try:
        found = meeting.gather(ranks, mesh.size, GATHER_S if placement is None else CONNECT_S)
    except BaseException:
        if placement is not None:
            placement.close()
        raise
    channels += [Channel(found[rank], incoming=FromRank) for rank in ranks]
    return host, placement


class Team:
    """All ranks as one runner: each step is told to the others, and then done here.

    A step that was begun here and not ended, be it by an interrupt, leaves the others waiting in it: then it is over.
    """

    def __init__(self, runner: Runner, ranks: Ranks):
        self.runner, self.ranks = runner, ranks
        self.new: list[tuple[int, Sampling]] = []  # since the last step
        self.gone: list[int] = []
        self.grammars: list[Grammar] = []
        self.is_amid = False  # a step
        self.close = weakref.finalize(self, _end, runner, ranks)  # by itself when nobody has it, too

    @property
    def sampling(self) -> dict[int, Sampling]:
        """See `Runner`."""
        return self.runner.sampling

    @property
    def logprobs(self) -> dict[int, deque[TokenLogprobs]]:
        """See `Runner`."""
        return self.runner.logprobs

    def prepare(self, grammar: Grammar) -> Future[Any]:
        """See `Runner.prepare`. Other ranks do so with the next step, if there is one before they need it."""
        self.grammars.append(grammar)
        return self.runner.prepare(grammar)

    def register(self, seq: int, sampling: Sampling) -> None:
        """See `Runner.register`."""
        self.new.append((seq, sampling))
        self.runner.register(seq, sampling)

    def take_prompt_logprobs(self, seq: int) -> tuple[TokenLogprobs, ...] | None:
        """See `Runner.take_prompt_logprobs`. Other ranks keep theirs until the sequence is forgotten."""
        return self.runner.take_prompt_logprobs(seq)

    def forget(self, seq: int) -> None:
        """See `Runner.forget`."""
        self.gone.append(seq)
        self.runner.forget(seq)

    def launch(self, plan: Plan) -> None:
        """See `Runner.launch`.

        Raises:
            PeerLost: another rank is gone, or waits in a step that this one has left.
        """
        if self.is_amid:
            raise PeerLost(
                "a step was not finished, in which the other ranks wait; the engine has to be started again"
            )
        self.is_amid = True
        most_rows = self.ranks.turn(sum(work.count + work.drafts for work in plan.work)) if plan.work else 0
        self.ranks.send(Step(self.new, self.gone, plan, most_rows, self.grammars))
        self.new, self.gone, self.grammars = [], [], []
        self.runner.expect(most_rows)
        self.runner.launch(plan)
        self.is_amid = bool(plan.work)

    def attend(self) -> None:
        """Take part in the step of other groups, if one is to come, without a sequence."""
        if most_rows := self.ranks.turn(0):
            self.ranks.send(Step([], [], NOTHING, most_rows))
            self.runner.expect(most_rows)
            self.runner.idle()

    def sample(self, plan: Plan) -> Callable[[], Result]:
        """See `Runner.sample`. Of several stages, the last one's ranks do it by themselves."""
        found = self.runner.sample(plan) if self.runner.samples else self._answer
        self.is_amid = False
        return found

    def _answer(self) -> Result:
        """Wait for what the oldest step in flight has brought."""
        answer, runner = self.ranks.answer(), self.runner
        for seq, scores in answer.logprobs.items():
            if seq in runner.logprobs:
                runner.logprobs[seq] += scores
        for seq, prompt in answer.prompt_logprobs.items():
            if seq in runner.prompt_logprobs:
                runner.prompt_logprobs[seq] += prompt
        return answer.result


def _end(runner: Runner, ranks: Ranks) -> None:
    """End the other ranks, and let go of this one's memory."""
    ranks.close()
    runner.close()
