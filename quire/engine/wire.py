"""What frontends, the keeper and an engine group say to each other, and how it travels. Knows no device and no text.

A message is msgpack behind its length, 4 bytes, big-endian.
"""

import math
import select
import socket
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from quire import errors
from quire.engine.events import Submission, TokenEvent
from quire.engine.metrics import StepStats
from quire.errors import EngineDead, QuireError

MAX_MESSAGE_BYTES = 256 * 2**20
HEADER_BYTES = 4
CHUNK_BYTES = 1 << 18


class WireError(QuireError):
    """A message cannot be sent, or what came is none.

    Attributes:
        request_id: whose message it was, if that much could be read; nothing else is affected then.
    """

    def __init__(self, message: str, *, request_id: str | None = None):
        super().__init__(message)
        self.request_id = request_id


class Message(msgspec.Struct, frozen=True, tag=True):
    """Anything that is said."""


class Launch(Message, frozen=True):
    """First to a group: the options of `Config`, and which of so many independent groups as these say it is."""

    options: dict[str, Any]
    group: int = 0


class Add(Message, frozen=True):
    """Compute a request, from the tokens it has."""

    submission: Submission


class Abort(Message, frozen=True):
    """Stop a request, or one of its sequences."""

    request_id: str
    index: int | None = None


class Reset(Message, frozen=True):
    """Forget what is cached, before anything that is said after this."""


class Ping(Message, frozen=True):
    """Answer with a `Pong` of the same number."""

    number: int


class Stop(Message, frozen=True):
    """End."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a group found out while it started."""

    options: dict[str, Any]  # every field of `Config`, derived ones filled in
    reasons: dict[str, str]
    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int
    summary: str
    start_s: float
    ranks: list[int]  # process ids of all ranks but the first


class Ready(Message, frozen=True):
    """The group takes requests."""

    facts: Facts


class Failed(Message, frozen=True):
    """The group cannot start; `kind` is the name of a class in `quire.errors`."""

    kind: str
    message: str


class Batch(Message, frozen=True):
    """Request ids that take part in the step to come, and those that no longer do; sent before the step."""

    entered: list[str]
    left: list[str]


class Events(Message, frozen=True):
    """What a step brought."""

    events: list[TokenEvent]
    stats: StepStats


class Refused(Message, frozen=True):
    """A request that can never be computed."""

    request_id: str
    message: str
    param: str | None = None


class Pong(Message, frozen=True):
    """The answer to `Ping`."""

    number: int


class Open(Message, frozen=True):
    """First to a worker: what its requests' names begin with, the options of `Config`, and those of the server."""

    prefix: str
    options: dict[str, Any]
    settings: dict[str, Any]


class Up(Message, frozen=True):
    """A worker answers HTTP."""

    chat: str | None  # see `InputProcessor.chat`


class News(Message, frozen=True):
    """What a worker's requests got."""

    events: list[TokenEvent]


class Ended(Message, frozen=True):
    """A worker's request is over because of an error; `error_of` makes it again."""

    request_id: str
    kind: str
    message: str
    details: dict[str, Any]


class Turned(Message, frozen=True):
    """The engine's status, and why if it is dead."""

    status: str
    error: str | None = None


class Samples(msgspec.Struct, frozen=True):
    """A metric, with name, labels and value of each of its samples."""

    name: str
    help: str
    kind: str
    samples: list[tuple[str, dict[str, str], float]]


class Scrape(Message, frozen=True):
    """A worker asks for everybody's metrics; answered by a `Report` of the same number."""

    number: int


class Collect(Message, frozen=True):
    """A worker is asked for its own metrics, which also shows whether it lives; answered by a `Report`."""

    number: int


class Report(Message, frozen=True):
    """Metrics, and how many calls wait for the engine."""

    number: int
    metrics: list[Samples]
    num_calls: int


class Drain(Message, frozen=True):
    """Refuse new work, let the old end; answered by `Drained`."""

    timeout_s: float


class Drained(Message, frozen=True):
    """A worker has nothing left to do."""


ToGroup = Launch | Add | Abort | Reset | Ping | Stop
FromGroup = Ready | Failed | Batch | Events | Refused | Pong
ToWorker = Open | Ready | News | Ended | Turned | Collect | Report | Drain | Stop
FromWorker = Up | Failed | Add | Abort | Scrape | Report | Drained


class Channel:
    """Messages over a connected stream socket. `send` and `receive` block; an asyncio program uses the other two."""

    def __init__(self, sock: socket.socket, *, incoming: Any = ToGroup):
        self.sock, self.buffer = sock, bytearray()
        self.encoder = msgspec.msgpack.Encoder()
        self.decoder = msgspec.msgpack.Decoder(incoming)

    def encode(self, message: Message) -> bytes:
        """A message as it travels.

        Raises:
            WireError: it is larger than the limit, or holds a number or a character that cannot travel.
        """
        name = type(message).__name__
        try:
            body = self.encoder.encode(message)
        except (OverflowError, UnicodeEncodeError, TypeError, RecursionError, msgspec.MsgspecError) as error:
            raise WireError(f"a {name} holds what cannot be sent: {error}") from None
        if len(body) > MAX_MESSAGE_BYTES:
            raise WireError(f"a {name} has {len(body)} bytes; the limit is {MAX_MESSAGE_BYTES}")
        return len(body).to_bytes(HEADER_BYTES, "big") + body

    def decode(self, data: bytes) -> Iterator[Any]:
        """The messages that `data` completes; the rest is kept for the next call.

        Raises:
            WireError: a message is larger than the limit, or is none of those expected. The next call goes on
                after one that could not be read; nothing can follow one that is too large.
        """
        self.buffer += data
        while (message := self._next()) is not None:
            yield message

    def _next(self) -> Any:
        """The first message in the buffer, or None if there is no whole one."""
        size = int.from_bytes(self.buffer[:HEADER_BYTES], "big")
        if size > MAX_MESSAGE_BYTES:
            raise WireError(f"a message claims {size} bytes; the limit is {MAX_MESSAGE_BYTES}")
        end = HEADER_BYTES + size
        if len(self.buffer) < end:
            return None
        body = bytes(self.buffer[HEADER_BYTES:end])
        del self.buffer[:end]
        try:
            return self.decoder.decode(body)
        except (ValueError, TypeError, RecursionError, msgspec.MsgspecError) as error:
            what = f"a message of {size} bytes cannot be read: {error}"
            raise WireError(what, request_id=_owner(body)) from None

    def send(self, message: Message) -> None:
        """Send, and wait until the other side has room for it.

        Raises:
            EngineDead: the other side is gone.
        """
        try:
            self.sock.sendall(self.encode(message))
        except OSError as error:
            raise EngineDead(f"the other side of the socket is gone: {error.strerror}") from None

    def receive(self, timeout: float | None) -> Any:
        """The next message, or None if there is none within `timeout` seconds (None: wait; 0: do not).

        Raises:
            EngineDead: the other side is gone, perhaps in the middle of a message.
            WireError: see `decode`.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while (message := self._next()) is None:
            left = None if until is None else max(until - time.monotonic(), 0.0)
            poll = select.poll()  # select() takes no descriptor beyond 1023
            poll.register(self.sock, select.POLLIN)
            if not poll.poll(None if left is None else math.ceil(left * 1000)):
                return None
            try:
                data = self.sock.recv(CHUNK_BYTES)
            except OSError as error:
                raise EngineDead(f"the other side of the socket is gone: {error.strerror}") from None
            if not data:
                where = " in the middle of a message" if self.buffer else ""
                raise EngineDead(f"the other side of the socket is gone{where}")
            self.buffer += data
        return message


def ended(name: str, error: QuireError) -> Ended:
    """An error as it travels, with its attributes."""
    return Ended(name, type(error).__name__, str(error), vars(error))


def error_of(kind: str, message: str, details: dict[str, Any] | None = None) -> QuireError:
    """An error that travelled; of a kind that nobody knows, an EngineDead."""
    known = {WireError.__name__: WireError, **vars(errors)}.get(kind)
    if not (isinstance(known, type) and issubclass(known, QuireError)):
        return EngineDead(message)
    found = known.__new__(known, message)  # as it was made, however that was
    vars(found).update(details or {})
    return found


def _owner(body: bytes) -> str | None:
    """The request that a damaged message is about."""
    try:
        match msgspec.msgpack.decode(body):
            case {"request_id": str(name)} | {"submission": {"request_id": str(name)}}:
                return name
    except (ValueError, TypeError, RecursionError, msgspec.MsgspecError):
        pass
    return None
