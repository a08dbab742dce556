"""The engine group: a process that computes token ids for a frontend, over one socket. Knows no text.

It obeys messages, steps and reports, and it may be killed at any time: whoever holds the other end has all that is
needed to start another one. It ends when that end closes, even in the middle of a step. SIGINT and SIGTERM are the
frontend's to handle: a group goes on while its frontend drains, and dies with it.
"""

import dataclasses
import faulthandler
import os
import signal
import socket
import sys
import threading
from functools import partial
from typing import Any

from quire.config import Config
from quire.engine.build import CoreParts, build_core
from quire.engine.core import EngineCore
from quire.engine.events import Submission, TokenEvent
from quire.engine.processes import hang_up, live
from quire.engine.ranks import Ranks, fork
from quire.engine.ticks import Alone, Follower, FromFollower, Leader, Line, Post, ToFollower, in_lockstep
from quire.engine.wire import (
    Abort,
    Add,
    Batch,
    Channel,
    Events,
    Facts,
    Failed,
    Launch,
    Ping,
    Pong,
    Ready,
    Refused,
    Reset,
    Stop,
    WireError,
    error_of,
)
from quire.errors import EngineDead, InvalidRequest, QuireError
from quire.log import logger
from quire.parallel.shared_memory import make_segment
from quire.types import FinishReason

MOST_COMMANDS = 256  # obeyed between two steps, so that a flood of them does not stop the streams


def main(sock: socket.socket) -> None:
    """A group's life: `Launch` comes first, then `Ready` or `Failed` goes out, then requests are served.

    SIGUSR1 writes every thread's stack to stderr, for whoever is about to kill a group that hangs.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    _serve(Channel(sock))


def _serve(channel: Channel, post: Post | None = None) -> None:
    """`post`: of a group that follows another."""
    try:
        launched = _launch(channel, post)
        if launched is not None:
            parts, line = launched
            Group(line, parts.core).run()
            parts.core.close()
    except EngineDead:
        pass  # the frontend is gone, and nobody is left to serve
    except Exception:
        logger.exception("the engine group stopped")
        os._exit(1)  # at once: what is broken is not asked to clean up
    channel.sock.close()


def _end_with(descriptor: int) -> None:
    """Wait until the other end of the socket closes, and end the process at once."""
    hang_up([descriptor])
    os._exit(0)


def _launch(channel: Channel, post: Post | None) -> tuple[CoreParts, Line] | None:
    """Start the engine; None if it cannot, which the frontend has been told, or need not any more."""
    message = channel.receive(None)
    if isinstance(message, Stop):  # the frontend was interrupted before it had one
        return None
    if not isinstance(message, Launch):
        raise WireError(f"the first message is a {type(message).__name__}; it must be a Launch")
    try:
        config, followers = Config.of(**message.options), None
        # Forks come before there are threads, or anything is computed.
        if post is None and in_lockstep(config):
            followers = _fork_groups(config, channel)
            post = followers.post
        others = [] if followers is None else [other.sock for other in followers.channels]
        ranks = fork(config, channel.sock, *others, post=post, group=message.group)
        watch = threading.Thread(
            target=_end_with, args=(channel.sock.fileno(),), name="quire-watch", daemon=True
        )
        watch.start()
        parts = build_core(
            config,
            offline=False,
            announce=lambda entered, left: channel.send(Batch(entered, left)),
            ranks=ranks,
            group=message.group,
        )
        facts = _facts(parts, ranks)
        if followers is not None:
            facts = followers.ready(facts)
    except QuireError as error:
        channel.send(Failed(type(error).__name__, str(error)))
        return None
    except Exception as error:
        logger.exception("the engine group could not start")
        channel.send(Failed("EngineDead", f"the engine could not start: {type(error).__name__}: {error}"))
        return None
    channel.send(Ready(facts))
    return parts, Alone(channel) if post is None else post.line


class Followers:
    """The other groups of one that leads; they end with it, and it with any of them."""

    def __init__(self, line: Leader, channels: list[Channel], pids: list[int], segment: int | None):
        self.channels, self.pids, self.post = channels, pids, Post(0, segment, line)
        self.line = line

    def ready(self, mine: Facts) -> Facts:
        """Wait for all, and watch them from then on; returns what is known of all groups together.

        Raises:
            ConfigError, ModelError, CapacityError: what a group could not do.
            EngineDead: one ended.
        """
        found = []
        for channel in self.channels:
            message = channel.receive(None)
            if isinstance(message, Failed):
                raise error_of(message.kind, message.message)
            if not isinstance(message, Ready):
                raise WireError(f"a group that starts says {type(message).__name__}; it must be Ready")
            found.append(message.facts)
        threading.Thread(target=self._watch, name="quire-groups", daemon=True).start()
        return self.line.joined(mine, found, self.pids)

    def _watch(self) -> None:
        hang_up([channel.sock.fileno() for channel in self.channels])
        if not self.line.stopped:
            logger.error("an engine group in lockstep with others died")
            os._exit(1)  # at once, wherever this one waits for it


def _fork_groups(config: Config, channel: Channel) -> Followers:
    """All groups but this one, which has just been started."""
    segment = make_segment() if sys.platform == "linux" else None
    pids, channels = list[int](), list[Channel]()
    for number in range(1, config.data_parallel_size):
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if not pid:
            for sock in (channel.sock, ours, *(other.sock for other in channels)):
                sock.close()
            live(partial(_follow, number=number, segment=segment), theirs)
        theirs.close()
        pids.append(pid)
        channels.append(Channel(ours, incoming=FromFollower))
        channels[-1].send(Launch(vars(config)))
    return Followers(Leader(channel, channels, config.seed), channels, pids, segment)


def _follow(sock: socket.socket, number: int, segment: int | None) -> None:
    """The life of a group that another leads, which is its frontend."""
    channel = Channel(sock, incoming=ToFollower)
    _serve(channel, Post(number, segment, Follower(channel)))


def _facts(parts: CoreParts, ranks: Ranks | None) -> Facts:
    config = parts.config
    return Facts(
        options={f.name: getattr(config, f.name) for f in dataclasses.fields(config)},
        reasons=dict(parts.reasons),
        vocab_size=parts.spec.vocab_size,
        max_model_len=parts.max_model_len,
        num_blocks=parts.core.stats().num_blocks,
        block_size=config.block_size or 0,
        summary=parts.summary,
        start_s=parts.start_s,
        ranks=[] if ranks is None else list(ranks.pids),
    )


class Group:
    """Obeys between steps; an engine without work waits for the next message."""

    def __init__(self, channel: Line, core: EngineCore):
        self.channel, self.core = channel, core

    def run(self) -> None:
        """Serve until told to stop.

        Raises:
            EngineDead: the frontend is gone.
        """
        while self._obey():
            num_turns = self.channel.num_turns
            if not self.core.idle:
                self._report_step()
            if self.channel.wanted and self.channel.num_turns == num_turns:
                self.core.attend()

    def _report_step(self) -> None:
        self._send(self.core.step())

    def _send(self, events: list[TokenEvent]) -> None:
        """Report; what is too large for a message, for one sequence alone, ends that sequence with an error."""
        try:
            return self.channel.send(Events(events, self.core.stats()))
        except WireError as error:
            if len(events) > 1:
                half = len(events) // 2
                self._send(events[:half])
                return self._send(events[half:])
            for event in events:
                name, index = event.request_id, event.index
                self.core.abort(name, index)
                failed = TokenEvent(
                    request_id=name,
                    index=index,
                    token=None,
                    finish=FinishReason.ERROR.value,
                    error=str(error),
                )
                self._send([failed])

    def _obey(self) -> bool:
        """Carry out what was asked for; wait for it while there is nothing to compute. False: stop."""
        timeout = None if self.core.idle else 0.0
        for _ in range(MOST_COMMANDS):
            try:
                message = self.channel.receive(timeout)
            except WireError as error:
                if error.request_id is None:
                    raise
                self.channel.send(Refused(error.request_id, str(error)))
                continue
            if message is None:
                break
            if isinstance(message, Stop):
                return False
            self._carry_out(message)
            timeout = 0.0
        return True

    def _carry_out(self, message: Any) -> None:
        match message:
            case Add(submission):
                self._add(submission)
            case Abort(request_id, index):
                self.core.abort(request_id, index)
                if self.core.idle:  # no step will tell
                    self._send([])
            case Reset():
                self.core.reset_prefix_cache()
            case Ping(number):
                self.channel.send(Pong(number))
            case _:
                raise WireError(f"a {type(message).__name__} is not expected now")

    def _add(self, submission: Submission) -> None:
        name = submission.request_id
        try:
            self.core.add(submission)
        except InvalidRequest as error:
            self.channel.send(Refused(name, str(error), error.param))
        except Exception as error:  # whatever one request holds, the others go on
            logger.exception("request %s could not be started", name)
            self.core.abort(name)
            self.channel.send(Refused(name, f"the request could not be started: {type(error).__name__}"))
