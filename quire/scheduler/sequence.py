"""A sequence: what was asked for, how far it is, and what it holds. Knows no policy."""

from array import array
from dataclasses import dataclass, field
from enum import Enum
from operator import attrgetter

from quire.scheduler.spans import Spans
from quire.types import CacheMisses, Coordinates


class State(Enum):
    """Where a sequence is. Only PREFILLING and DECODING ones run: they have a seat and hold blocks."""

    QUEUED = "queued"  # may be seated when there is room
    PARKED = "parked"  # waits for a block that a running sequence computes
    RETURNING = "returning"  # preempted, and some of its tokens are still in flight
    PREFILLING = "prefilling"  # has known tokens that no plan has covered
    DECODING = "decoding"  # every plan covers its newest token
    FINISHED = "finished"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSequence:
    """What to compute, and when to stop.

    A sequence that was interrupted elsewhere brings its `output` so far, and goes on as if nothing had happened:
    all limits count from the prompt's end. Stop tokens and ends of sequence count only from the `min_tokens`-th
    output on. Sequences find each other's blocks only under equal `cache_root`s; one with `read_cache=False`
    computes every position itself.
    """

    id: int  # never used twice
    prompt: tuple[int, ...]
    max_tokens: int
    output: tuple[int, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    priority: int = 0  # lower runs first
    tenant: str = ""
    share: float = 1.0  # of the machine that the tenant gets, relative to other tenants
    cache_root: bytes = b""
    coordinates: Coordinates | None = None
    read_cache: bool = True
    spans: Spans = ()  # of the prompt


@dataclass(slots=True, eq=False)
class Tenant:
    """Whose sequences share what."""

    name: str
    served: float = 0.0  # virtual time: what was computed, or is about to be, in its positions' prices
    price: float = 1.0  # of a position: the higher the tenant's share, the lower
    num_sequences: int = 0  # unfinished


@dataclass(slots=True, eq=False)
class Holding:
    """A sequence's part of the cache."""

    blocks: list[int] = field(default_factory=list)  # in the order of the positions they hold
    # beside each of blocks[passed:], as far as the sequence has taken any (holdings.py)
    near: list[tuple[int, ...]] = field(default_factory=list)
    passed: int = 0  # blocks whose positions near layers see no more
    capacity: int = 0  # positions that fit into all of them
    num_published: int = 0  # blocks, from the first, that are full and findable
    num_claimed: int = 0  # blocks, from the first, that others may wait for
    next_full: int = 0  # computed positions at which there is a block to publish
    keys: list[bytes] = field(default_factory=list)  # of full blocks by content, whatever blocks are held
    restore: int = -1  # the row of the state it begins with, held until the device has been told
    cuts: set[int] = field(default_factory=set)  # numbers of blocks after which others want its state
    saves: dict[int, int] = field(
        default_factory=dict
    )  # rows that plans write, by the number of blocks before
    passing: bytes = b""  # the key of the latest state that is findable and that nobody wanted


@dataclass(slots=True, eq=False)
class SequenceStats:
    """How a sequence fared; complete when it has ended. Times are on the caller's clock."""

    added_s: float
    seated_s: float | None = None  # first
    num_cached_tokens: int = 0  # of the prompt, found in the cache when it was first seated
    cache_misses: CacheMisses | None = None  # the prompt's other tokens; whoever passes them on may take them
    num_preemptions: int = 0


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence's progress. To others than the scheduler only `id` and `stats` mean anything."""

    id: int
    new: NewSequence
    tenant: Tenant
    rank: tuple[int, int]  # priority and order of arrival; the highest is preempted first
    stops: frozenset[int]  # tokens that may end it
    limit: int  # positions ever computed: the last token of all is only read
    tokens: "array[int]"  # int64, what the host knows; the garbage collector need not look into it
    stats: SequenceStats
    state: State = State.QUEUED
    planned: int = 0  # positions that plans have covered; drafts in flight make it an upper bound
    pending: int = 0  # tokens that plans in flight sample, at most
    epoch: int = 0  # bumped when planned work is thrown away
    slot: int = -1  # -1: the device does not know it
    kv: Holding = field(default_factory=Holding)

    @property
    def num_to_prefill(self) -> int:
        """Known tokens that no plan has covered."""
        return len(self.tokens) - self.planned


BY_RANK = attrgetter("rank")
