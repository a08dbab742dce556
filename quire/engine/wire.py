"""What the frontend and an engine group say to each other, and how it travels. Knows no device and no text.

A message is msgpack behind its length, 4 bytes, big-endian.
"""

import select
import socket
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from quire.engine.events import Submission, TokenEvent
from quire.engine.metrics import StepStats
from quire.errors import EngineDead, QuireError

MAX_MESSAGE_BYTES = 256 * 2**20
HEADER_BYTES = 4
CHUNK_BYTES = 1 << 18


class Message(msgspec.Struct, frozen=True, tag=True):
    """Anything that is said."""


class Launch(Message, frozen=True):
    """First to a group: the options of `Config`."""

    options: dict[str, Any]


class Add(Message, frozen=True):
    """Compute a request, from the tokens it has."""

    submission: Submission


class Abort(Message, frozen=True):
    """Stop a request, or one of its sequences."""

    request_id: str
    index: int | None = None


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


ToGroup = Launch | Add | Abort | Ping | Stop
FromGroup = Ready | Failed | Batch | Events | Refused | Pong
