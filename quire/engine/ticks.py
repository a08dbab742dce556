"""Engine groups among whose ranks experts are spread: they compute in lockstep, by ticks. Knows no device and no text.

The first group leads. It alone has the frontend's socket, and divides requests among all.

    a group with a step ──Due(rows)──> leader ──Ask──> groups that have said nothing ──Due(0 or more)──> leader
    leader ──Go(most rows of any)──> all: each computes one step, with no tokens if it has none

If nobody has work there is no tick, and all wait at their sockets. A group that computes alone has nobody to wait for.
"""

import dataclasses
import math
import select
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from quire.config import Config
from quire.engine.division import Division
from quire.engine.events import Submission
from quire.engine.metrics import StepStats, added
from quire.engine.wire import (
    Abort,
    Add,
    Channel,
    Events,
    Facts,
    FromGroup,
    Message,
    Refused,
    Reset,
    Stop,
    ToGroup,
)
from quire.errors import EngineDead, PeerLost


class Due(Message, frozen=True):
    """A group has a step of so many tokens; 0: none, but takes part in that of others."""

    num_rows: int


class Ask(Message, frozen=True):
    """Another group has a step."""


class Go(Message, frozen=True):
    """Compute one step; no group has more tokens in it than this."""

    most_rows: int


class Meet(Message, frozen=True):
    """Where the leader's store listens, through which all ranks find each other."""

    port: int


ToFollower = ToGroup | Ask | Go | Meet
FromFollower = FromGroup | Due


def in_lockstep(config: Config) -> bool:
    """Whether groups have experts of each other's; else each has the whole network."""
    return config.enable_expert_parallel and config.data_parallel_size > 1


class Line(Protocol):
    """What a group has of those that it works for and with.

    Attributes:
        wanted: others wait for this group to take part in their step.
        num_turns: steps that all groups have begun.
    """

    @property
    def wanted(self) -> bool: ...

    @property
    def num_turns(self) -> int: ...

    def send(self, message: Message) -> None: ...

    def receive(self, timeout: float | None) -> Any:
        """The next command; None if there is none in time, or if this group is wanted."""

    def turn(self, num_rows: int) -> int:
        """Wait until all groups begin a step, this one with so many tokens; returns the most that any has."""


@dataclasses.dataclass(frozen=True, slots=True)
class Post:
    """A group's place among those that compute in lockstep.

    Attributes:
        number: which group it is; 0 leads.
        segment: a descriptor of memory that all ranks share, if there is any.
    """

    number: int
    segment: int | None
    line: "Leader | Follower"


class Alone:
    """A group without others."""

    wanted, num_turns = False, 0

    def __init__(self, channel: Channel):
        self.send, self.receive = channel.send, channel.receive

    def turn(self, num_rows: int) -> int:
        """See `Line`."""
        return num_rows


class Follower:
    """The line of any group but the first, which is to its leader."""

    def __init__(self, channel: Channel):
        self.channel, self.send = channel, channel.send
        self.kept = deque[Any]()  # commands that came while a step was to begin
        self.wanted, self.num_turns = False, 0

    def receive(self, timeout: float | None) -> Any:
        """See `Line`."""
        if self.kept:
            return self.kept.popleft()
        message = None if self.wanted else self.channel.receive(timeout)
        if isinstance(message, Ask):
            self.wanted, message = True, None
        return message

    def turn(self, num_rows: int) -> int:
        """See `Line`."""
        self.channel.send(Due(num_rows))
        while not isinstance(message := self.channel.receive(None), Go):
            if not isinstance(message, Ask):  # it came when this group had said so already
                self.kept.append(message)
        self.wanted, self.num_turns = False, self.num_turns + 1
        return message.most_rows

    def meet(self, port: int | None = None) -> int:
        """Where the leader's store listens."""
        message = self.channel.receive(None)
        if not isinstance(message, Meet):
            raise EngineDead(f"the leader said {type(message).__name__} instead of where its store listens")
        return message.port


class Leader:
    """The first group's line: to the frontend, and to the others, whose words it passes on."""

    def __init__(self, channel: Channel, others: Sequence[Channel], seed: int):
        self.channel, self.others, self.num_turns, self.stopped = channel, others, 0, False
        self.due: dict[int, int] = {}  # rows of the step to come, by group
        self.latest: dict[int, StepStats] = {}
        self.division = Sequences(len(others) + 1, seed)

    @property
    def wanted(self) -> bool:
        """See `Line`."""
        return bool(self.due)

    def send(self, message: Message) -> None:
        """What the first group says, to the frontend."""
        self._tell(0, message)

    def receive(self, timeout: float | None) -> Any:
        """See `Line`. What is for others goes to them."""
        while True:
            self._hear()
            message = self.channel.receive(0.0)
            if message is not None:
                if self._is_mine(message):
                    return message
            elif self.due or timeout == 0.0:
                return None
            else:
                _wait_for([self.channel, *self.others], timeout)

    def turn(self, num_rows: int) -> int:
        """See `Line`."""
        for number, other in enumerate(self.others, 1):
            if number not in self.due:
                _say(other, Ask())
        while len(self.due) < len(self.others):
            _wait_for(self.others, None)
            self._hear()
        most = max(num_rows, *self.due.values())
        self.due.clear()
        for other in self.others:
            _say(other, Go(most))
        self.num_turns += 1
        return most

    def meet(self, port: int | None = None) -> int:
        """Tell the others where the store listens."""
        if port is None:
            raise EngineDead("the leader of groups in lockstep has no store")
        for other in self.others:
            _say(other, Meet(port))
        return port

    def joined(self, mine: Facts, theirs: Sequence[Facts], pids: Sequence[int]) -> Facts:
        """Facts of all groups together; `pids`: the others' first processes."""
        for number, facts in enumerate((mine, *theirs)):
            self.division.holds(number, facts.num_blocks * facts.block_size)
        ranks = [rank for facts in (mine, *theirs) for rank in facts.ranks]
        blocks = sum(facts.num_blocks for facts in (mine, *theirs))
        return msgspec.structs.replace(mine, ranks=[*pids, *ranks], num_blocks=blocks)

    def _is_mine(self, message: Message) -> bool:
        """Whether a command is for the first group; for others, it is passed on."""
        if isinstance(message, Reset | Stop):
            self.stopped = self.stopped or isinstance(message, Stop)
            self.division.forget()
            for other in self.others:
                _say(other, message)
            return True
        number: int | None = 0
        if isinstance(message, Add):
            number = self.division.route(message.submission)
        elif isinstance(message, Abort):
            number = self.division.aborted(message.request_id, message.index)
        if number:
            _say(self.others[number - 1], message)
        return number == 0

    def _hear(self) -> None:
        """All that the others have said."""
        for number, other in enumerate(self.others, 1):
            while (message := _heard(other)) is not None:
                if isinstance(message, Due):
                    self.due[number] = message.num_rows
                else:
                    self._tell(number, message)

    def _tell(self, number: int, message: Message) -> None:
        """The frontend, for which all groups are one."""
        if isinstance(message, Events):
            self.division.heard(message)
            self.latest[number] = message.stats
            new = message.stats.prefill_tokens  # the others' are no news
            stats = dataclasses.replace(added(self.latest.values()), prefill_tokens=new)
            message = Events(message.events, stats)
        elif isinstance(message, Refused):
            self.division.ended(message.request_id)
        self.channel.send(message)


class Sequences(Division):
    """A division of requests whose sequences end one by one."""

    def __init__(self, num_groups: int, seed: int):
        super().__init__(num_groups, seed)
        self.num_left: dict[str, int] = {}  # by the name of an open request

    def route(self, submission: Submission) -> int:
        """See `Division`."""
        outputs = submission.outputs or ((),) * submission.params.n
        self.num_left[submission.request_id] = sum(output is not None for output in outputs)
        return super().route(submission)

    def aborted(self, name: str, index: int | None) -> int | None:
        """The group whose request it is, or whose sequence; None if nobody's."""
        ticket = self.tickets.get(name)
        if ticket is None:
            return None
        self._less(name, self.num_left[name] if index is None else 1)
        return ticket.replica

    def heard(self, message: Events) -> None:
        """Note what begins and ends."""
        for event in message.events:
            if event.token is not None:
                self.began(event.request_id)
            if event.finish is not None and event.request_id in self.tickets:
                self._less(event.request_id, 1)

    def ended(self, name: str) -> None:
        """See `Division`."""
        self.num_left.pop(name, None)
        super().ended(name)

    def _less(self, name: str, count: int) -> None:
        self.num_left[name] -= count
        if self.num_left[name] <= 0:
            self.ended(name)


def _wait_for(channels: Sequence[Channel], timeout: float | None) -> None:
    poll = select.poll()
    for channel in channels:
        poll.register(channel.sock, select.POLLIN)
    poll.poll(None if timeout is None else math.ceil(timeout * 1000))


def _say(other: Channel, message: Message) -> None:
    try:
        other.send(message)
    except EngineDead as error:
        raise PeerLost(f"an engine group in lockstep with this one is gone: {error}") from None


def _heard(other: Channel) -> Any:
    try:
        return other.receive(0.0)
    except EngineDead as error:
        raise PeerLost(f"an engine group in lockstep with this one is gone: {error}") from None
