"""What passes between the scheduler and a device: a step's plan, and what came of it. Only integers.

Values, never changed once made. `Work` and `Emitted` are not frozen, because a step makes hundreds of them
and making a frozen one takes five times as long.
"""

from dataclasses import dataclass, field

from quire.scheduler.spans import Spans
from quire.types import Coordinates


@dataclass(frozen=True, slots=True)
class Start:
    """A sequence takes a slot. Everything the device must know that it cannot compute itself."""

    seq: int
    slot: int
    tokens: tuple[int, ...]  # prompt, then the outputs so far: a preempted sequence comes back with some
    prompt_len: int
    restore: int = -1  # the row whose state it begins with, of networks that keep states; -1: zeros
    coordinates: Coordinates | None = None  # None: tokens are one after another
    spans: Spans = ()  # positions of the prompt that see each other


@dataclass(slots=True)
class Work:
    """One sequence's share of a step: positions start .. start + count + drafts - 1."""

    seq: int
    slot: int
    epoch: int  # results of an older epoch still deliver tokens but claim no KV
    start: int  # first position, if every draft in flight is accepted
    exact: bool  # no draft in flight: start is the truth
    count: int  # positions whose tokens are known to the host, or sampled by an earlier plan
    drafts: int  # further positions, which verify tokens that the device drafted
    new_blocks: tuple[int, ...]  # appended to the slot's block table before the step
    samples: bool  # the last position is the sequence's newest: sample its successor
    save: int = -1  # the row that the slot's state is copied to after the step; -1: none
    token: int = -1  # at `start`, where the plan brings it; -1: the device knows it


@dataclass(frozen=True, slots=True)
class Plan:
    """A step. Devices apply it in this order: ends, starts, beside, work. Without work it brings only changes."""

    step: int  # counts plans with work or ends, from 1
    work: tuple[Work, ...]
    starts: tuple[Start, ...] = ()
    ends: tuple[int, ...] = ()  # slots given up since the last plan
    beside: tuple[
        tuple[int, ...], ...
    ] = ()  # blocks, each with those that near layers have beside it from now on


@dataclass(frozen=True, slots=True)
class Result:
    """What a plan's work sampled, in the plan's order; empty for work that does not sample."""

    tokens: tuple[tuple[int, ...], ...]
    errors: dict[int, str] = field(default_factory=dict)  # sequences that failed, and why
    lost: frozenset[int] = frozenset()  # those whose state was lost: they have to begin again


@dataclass(slots=True)
class Emitted:
    """A token the host has learned. `finish` is a FinishReason's value when it was the last one."""

    seq: int
    token: int | None  # None: the sequence ended without another token
    finish: str | None = None
    stop_token: int | None = None  # which stop token ended it, unless it was an end-of-sequence token
    error: str | None = None  # why, when finish is "error"
