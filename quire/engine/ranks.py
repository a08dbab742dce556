"""Rank 0's hold on the other ranks of its group: starts them, tells each step to all, notices when one is gone.

They live and die together. A group's ranks are forked; those of an engine in the caller's process, which may have
threads or have used a GPU, are started afresh.
"""

import os
import socket
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta

import torch
from torch.distributed import TCPStore

from quire.config import Config
from quire.engine.processes import command, hang_up, live
from quire.engine.rank import CONNECT_S, LOOPBACK, FromRank, Join, Step, serve
from quire.engine.wire import Channel, Failed, error_of
from quire.errors import EngineDead, PeerLost
from quire.log import logger
from quire.parallel import shared_memory
from quire.parallel.axis import Axes
from quire.parallel.factory import Rendezvous, communicators
from quire.parallel.mesh import Mesh
from quire.resolve import Memory
from quire.runner.runner import Runner, Sampling
from quire.scheduler.plan import Plan, Result
from quire.types import TokenLogprobs

RANK = "quire.engine.rank"
PATIENCE_S = 5.0  # for processes that end


class Ranks:
    """All ranks but the first, from their start to their end.

    Attributes:
        pids: their process ids.
    """

    def __init__(
        self,
        mesh: Mesh,
        channels: Sequence[Channel],
        segment: int | None,
        pids: Sequence[int],
        processes: Sequence["subprocess.Popen[bytes]"] = (),
    ):
        """`processes`: those of the pids that are to be waited for. If there are none, whoever started this process
        sees to them, and a lost one is the end of this one.
        """
        self.channels, self.segment, self.pids, self.processes = channels, segment, pids, processes
        self.mesh = mesh
        self.store: TCPStore | None = None
        self.poison: Callable[[], None] = lambda: None
        self.watcher: threading.Thread | None = None
        self.closed = False

    def join(self, config: Config, memory: Memory, device: torch.device) -> Axes:
        """Tell all ranks what was decided, and connect with them; returns what they share."""
        port = None
        if device.type != "cpu" or self.segment is None or shared_memory.why_not(self.mesh) is not None:
            port = self._open_store()
        else:
            self.poison = shared_memory.Segment(self.segment, self.mesh, range(self.mesh.size)).poison
        for rank, channel in enumerate(self.channels, 1):
            channel.send(Join(rank, dict(vars(config)), memory, port))
        return communicators(self.mesh, 0, Rendezvous(self.store, segment=self.segment), device)

    def wait(self) -> None:
        """Until all are ready; from then on they are watched.

        Raises:
            ConfigError, ModelError, CapacityError: what a rank could not do.
            EngineDead: one ended.
        """
        for rank, channel in enumerate(self.channels, 1):
            try:
                message = channel.receive(None)
            except EngineDead:
                raise EngineDead(
                    f"rank {rank} of {self.mesh.size} died while it started; see the log"
                ) from None
            if isinstance(message, Failed):
                raise error_of(message.kind, message.message)
        self.watcher = threading.Thread(target=self._watch, name="quire-ranks", daemon=True)
        self.watcher.start()

    def send(self, step: Step) -> None:
        """To all of them.

        Raises:
            PeerLost: one is gone.
        """
        data = self.channels[0].encode(step)
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
        if self.watcher is not None:
            self.watcher.join()
        for channel in self.channels:
            channel.sock.close()
        if self.segment is not None:
            os.close(self.segment)
        for process in self.processes:
            if self.watcher is None:  # it may be loading modules still, and would notice only after that
                process.kill()
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _open_store(self) -> int:
        """Through which ranks find each other; at this machine's own address only."""
        listening = socket.create_server((LOOPBACK, 0))
        port: int = listening.getsockname()[1]
        self.store = TCPStore(
            LOOPBACK,
            port,
            None,
            True,
            timedelta(seconds=CONNECT_S),
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )
        return port

    def _watch(self) -> None:
        hang_up([channel.sock.fileno() for channel in self.channels])
        if self.closed:
            return
        logger.error("a rank of this engine died")
        if not self.processes:
            os._exit(1)  # at once, wherever this one waits for it
        self.poison()


def fork(mesh: Mesh, *others: socket.socket) -> Ranks | None:
    """All other ranks of this process's mesh, which has done nothing yet that a fork would not survive.

    `others`: its open sockets, which are not for them.
    """
    if mesh.size == 1:
        return None
    segment, pids, channels = _segment(), list[int](), list[Channel]()
    for _ in range(1, mesh.size):
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if not pid:
            for sock in (*others, ours, *(channel.sock for channel in channels)):
                sock.close()  # or it would not be closed when this process ends
            live(lambda sock: serve(sock, segment), theirs)
        theirs.close()
        pids.append(pid)
        channels.append(Channel(ours, incoming=FromRank))
    return Ranks(mesh, channels, segment, pids)


def spawn(mesh: Mesh) -> Ranks | None:
    """All other ranks as processes of their own, whatever this one is like."""
    if mesh.size == 1:
        return None
    segment, processes, channels = _segment(), list["subprocess.Popen[bytes]"](), list[Channel]()
    for _ in range(1, mesh.size):
        ours, theirs = socket.socketpair()
        channels.append(Channel(ours, incoming=FromRank))
        with theirs:
            given = [theirs.fileno()] if segment is None else [theirs.fileno(), segment]
            words = command(RANK, *map(str, given))
            processes.append(subprocess.Popen(words, pass_fds=given, stdin=subprocess.DEVNULL))
    return Ranks(mesh, channels, segment, [process.pid for process in processes], processes)


def _segment() -> int | None:
    return shared_memory.make_segment() if sys.platform == "linux" else None


class Team:
    """All ranks as one runner: each step is told to the others, and then done here.

    A step that was begun here and not ended, be it by an interrupt, leaves the others waiting in it: then it is over.
    """

    def __init__(self, runner: Runner, ranks: Ranks):
        self.runner, self.ranks = runner, ranks
        self.new: list[tuple[int, Sampling]] = []  # since the last step
        self.gone: list[int] = []
        self.is_amid = False  # a step
        weakref.finalize(self, ranks.close)

    @property
    def sampling(self) -> dict[int, Sampling]:
        """See `Runner`."""
        return self.runner.sampling

    @property
    def logprobs(self) -> dict[int, deque[TokenLogprobs]]:
        """See `Runner`."""
        return self.runner.logprobs

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
        self.ranks.send(Step(self.new, self.gone, plan))
        self.new, self.gone = [], []
        self.runner.launch(plan)
        self.is_amid = bool(plan.work)

    def sample(self, plan: Plan, masks: None = None) -> Callable[[], Result]:
        """See `Runner.sample`."""
        found = self.runner.sample(plan, masks)
        self.is_amid = False
        return found

    def close(self) -> None:
        """End the other ranks, and let go of this one's memory."""
        self.ranks.close()
        self.runner.close()
