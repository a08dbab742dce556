"""Which of several replicas computes a request: the one where it is expected to begin first. Pure.

cost = (prompt tokens queued there + those of this request that it has not cached) * seconds a token
     + running requests * seconds that each adds

What a replica has cached is guessed: what was routed there of late. How much waits is this router's own bookkeeping,
and what the replica last reported beyond that. `now` is seconds on one clock that never goes back.
"""

import hashlib
import random
from collections import OrderedDict
from collections.abc import Container, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from quire.errors import Overloaded

TOKEN_S = 1 / 12_000  # a prompt token, before anything was measured
RUNNING_TOKENS = 120  # prompt tokens that a running request is worth: their steps take turns
LATEST = 0.05  # what the latest measurement counts in a running mean
MIN_TOKENS = 64  # that a measurement rests on
MOST_RATIO = 8.0  # of two replicas' speeds
TIE = 1.05  # costs that differ by less are equal
TIE_TOKENS = 16
FAILURES = 3  # in a row, until a replica is left out
MOST_DOUBLINGS = 6
MAX_RETRY_S = 120
RETRY_SHARE, RETRY_RESERVE = 0.1, 20.0  # of requests that may be tried again


class State(Enum):
    """Whether a replica takes requests."""

    UP = "up"
    DRAINING = "draining"
    DOWN = "down"


class Circuit:
    """Leaves a replica out after failures: 1 s, then 2, 4, ...; after each time one request may try."""

    def __init__(self) -> None:
        self.succeeded()

    def succeeded(self) -> None:
        self.num_failures = self.num_openings = 0
        self.until_s = 0.0
        self.is_open = self.is_probing = False

    def allows(self, now: float) -> bool:
        return not self.is_open or (now >= self.until_s and not self.is_probing)

    def taken(self) -> None:
        """A request goes there; while the circuit is open, that is the probe."""
        self.is_probing = self.is_open

    def untried(self) -> None:
        """A request that went there ended without telling anything."""
        self.is_probing = False

    def failed(self, now: float) -> None:
        self.num_failures += 1
        if self.is_open and not self.is_probing:
            return  # of a request that began before
        if self.is_probing or self.num_failures >= FAILURES:
            self.until_s = now + 2.0 ** min(self.num_openings, MOST_DOUBLINGS)
            self.num_openings += 1
            self.is_open, self.is_probing = True, False


class Index:
    """Which replicas may have which pieces of prompts cached: hash -> replicas (bits), the latest of each kept.

    A piece is named by a hash of all up to its end, so a prompt is a chain of them.
    """

    def __init__(self, num_replicas: int, capacity: int):
        self.owners: dict[Hashable, int] = {}
        self.kept: list[OrderedDict[Hashable, None]] = [OrderedDict() for _ in range(num_replicas)]
        self.capacities = [capacity] * num_replicas

    def hits(self, chain: Sequence[Hashable]) -> list[int]:
        """How many pieces from its beginning each replica has."""
        counts, have = [0] * len(self.kept), (1 << len(self.kept)) - 1
        for depth, piece in enumerate(chain):
            still = have & self.owners.get(piece, 0)
            for replica in _bits(have & ~still):
                counts[replica] = depth
            have = still
            if not have:
                break
        for replica in _bits(have):
            counts[replica] = len(chain)
        return counts

    def put(self, replica: int, chain: Sequence[Hashable]) -> None:
        """A replica gets a prompt."""
        kept, bit = self.kept[replica], 1 << replica
        for piece in reversed(chain):  # a chain's tail is given up before its head
            kept[piece] = None
            kept.move_to_end(piece)
            self.owners[piece] = self.owners.get(piece, 0) | bit
        while len(kept) > self.capacities[replica]:
            self._drop(kept.popitem(last=False)[0], bit)

    def forget(self, replica: int) -> None:
        """It has nothing any more."""
        for piece in self.kept[replica]:
            self._drop(piece, 1 << replica)
        self.kept[replica].clear()

    def _drop(self, piece: Hashable, bit: int) -> None:
        left = self.owners[piece] & ~bit
        if left:
            self.owners[piece] = left
        else:
            del self.owners[piece]


@dataclass(slots=True)
class Replica:
    """What is known of one."""

    name: str
    state: State = State.UP
    circuit: Circuit = field(default_factory=Circuit)
    queued_tokens: int = 0  # routed from here, not prefilled as far as is known
    num_open: int = 0  # routed from here, not ended
    num_running: int = 0  # of these, those that have begun
    others_tokens: int = 0  # what it reported beyond that
    others_running: int = 0
    token_s: float = 0.0  # measured; 0: nothing was


@dataclass(slots=True, eq=False)
class Ticket:
    """A request at its replica, until it ends there."""

    replica: int
    num_tokens: int  # not cached
    num_cached: int
    ahead_tokens: int  # what was to be computed before it began, its own included
    since_s: float
    begun: bool = False
    ended: bool = False


class Router:
    """Chooses replicas, by number. Requests are told of at three moments: `route`, `began`, `ended`.

    Args:
        names: of the replicas; equal ones in several routers make ties end alike.
        piece_tokens: that a piece of a prompt has.
        capacity: pieces that a replica is taken to have cached.
        most_s: the longest wait that a request may be expected to have.
        waits: a request may wait at a replica that is down, if none is up.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        piece_tokens: int,
        capacity: int,
        most_s: float = 30.0,
        waits: bool = False,
        seed: int = 0,
    ):
        self.replicas = [Replica(name) for name in names]
        self.index = Index(len(names), capacity)
        self.piece_tokens, self.most_s, self.waits = piece_tokens, most_s, waits
        self.chance = random.Random(seed)
        self.retries = RETRY_RESERVE
        self.num_cached_tokens = self.num_prompt_tokens = 0

    def route(
        self,
        chain: Sequence[Hashable],
        num_tokens: int,
        now: float,
        *,
        session: str = "",
        without: Container[int] = (),
    ) -> Ticket:
        """Choose for a prompt. `chain` are its pieces; `without` are replicas not to be tried.

        Raises:
            Overloaded: nobody takes requests (reason `no_replica`), or all would take too long.
        """
        able = [i for i, r in enumerate(self.replicas) if self._allows(r, now) and i not in without]
        if not able and self.waits:
            able = [i for i, r in enumerate(self.replicas) if r.state is State.DOWN]
        if not able:
            raise self._nobody(now)
        hits = self.index.hits(chain)
        new = [max(num_tokens - hits[i] * self.piece_tokens, min(num_tokens, 1)) for i in range(len(hits))]
        costs = {i: self._cost_s(i, new[i]) for i in able}
        chosen = self._choose(costs, session)
        if costs[chosen] > self.most_s and self._queued(chosen):
            raise _refusal(
                "max_queue_seconds", "every replica has more than it can serve", costs[chosen] - self.most_s
            )
        replica = self.replicas[chosen]
        replica.circuit.taken()
        replica.queued_tokens += new[chosen]
        replica.num_open += 1
        self.index.put(chosen, chain)
        cached = num_tokens - new[chosen]
        self.num_prompt_tokens += num_tokens
        self.num_cached_tokens += cached
        self.retries = min(self.retries + RETRY_SHARE, max(RETRY_RESERVE, self.retries))
        return Ticket(chosen, new[chosen], cached, self._queued(chosen), now)

    def began(self, ticket: Ticket, now: float, *, measured: bool = True) -> None:
        """Its first token is there; not `measured`: it must be by now. Only the first time counts."""
        if ticket.begun or ticket.ended:
            return
        ticket.begun = True
        replica = self.replicas[ticket.replica]
        replica.queued_tokens -= ticket.num_tokens
        replica.num_running += 1
        if measured and ticket.ahead_tokens >= MIN_TOKENS and now > ticket.since_s:
            sample_s = (now - ticket.since_s) / ticket.ahead_tokens
            known = [r.token_s for r in self.replicas if r.token_s]
            if known:
                mean_s = sum(known) / len(known)
                sample_s = min(max(sample_s, mean_s / MOST_RATIO), mean_s * MOST_RATIO)
            replica.token_s += (sample_s - replica.token_s) * (LATEST if replica.token_s else 1.0)

    def ended(self, ticket: Ticket) -> None:
        """It is over there, however that was. Only the first time counts."""
        if ticket.ended:
            return
        ticket.ended = True
        replica = self.replicas[ticket.replica]
        replica.num_open -= 1
        if ticket.begun:
            replica.num_running -= 1
        else:
            replica.queued_tokens -= ticket.num_tokens
            replica.circuit.untried()

    def failed(self, ticket: Ticket, now: float) -> None:
        """The replica could not serve it."""
        self.replicas[ticket.replica].circuit.failed(now)

    def succeeded(self, ticket: Ticket) -> None:
        """The replica serves it."""
        self.replicas[ticket.replica].circuit.succeeded()

    def may_retry(self) -> bool:
        """Whether one more request may be tried elsewhere: a tenth of all; more would only add to the load."""
        if self.retries < 1:
            return False
        self.retries -= 1
        return True

    def reported(self, replica: int, queued_tokens: int, num_running: int, num_pieces: int = 0) -> None:
        """What a replica says that it has; `num_pieces` is what its cache holds, 0 if it does not say."""
        known = self.replicas[replica]
        known.others_tokens = max(queued_tokens - known.queued_tokens, 0)
        known.others_running = max(num_running - known.num_open, 0)
        if num_pieces:
            self.index.capacities[replica] = num_pieces

    def turned(self, replica: int, state: State) -> None:
        """A replica takes requests, or does not. One that is down has lost what it had cached."""
        known = self.replicas[replica]
        if state is State.DOWN and known.state is not State.DOWN:
            self.index.forget(replica)
            known.others_tokens = known.others_running = 0
        known.state = state

    def is_able(self, now: float) -> bool:
        """Some replica takes requests."""
        return any(self._allows(replica, now) for replica in self.replicas)

    def expected_s(self, ticket: Ticket) -> float:
        """How long it was expected to take to its first token."""
        return ticket.ahead_tokens * self._token_s(self.replicas[ticket.replica])

    def _allows(self, replica: Replica, now: float) -> bool:
        return replica.state is State.UP and replica.circuit.allows(now)

    def _queued(self, i: int) -> int:
        return self.replicas[i].queued_tokens + self.replicas[i].others_tokens

    def _cost_s(self, i: int, num_new: int) -> float:
        replica = self.replicas[i]
        running = replica.num_running + replica.others_running
        return (self._queued(i) + num_new + running * RUNNING_TOKENS) * self._token_s(replica)

    def _token_s(self, replica: Replica) -> float:
        """Measured; else as the others, else a guess."""
        known = [r.token_s for r in self.replicas if r.token_s]
        return replica.token_s or (sum(known) / len(known) if known else TOKEN_S)

    def _choose(self, costs: dict[int, float], session: str) -> int:
        least = min(costs.values())
        most = least * TIE + TIE_TOKENS * TOKEN_S
        tied = [i for i, cost in costs.items() if cost <= most]
        if len(tied) == 1 or not session:
            return self.chance.choice(tied)
        return max(tied, key=lambda i: _weight(session, self.replicas[i].name))

    def _nobody(self, now: float) -> Overloaded:
        waits = [r.circuit.until_s - now for r in self.replicas if r.state is State.UP and r.circuit.is_open]
        return _refusal("no_replica", "no replica takes requests", min(waits, default=2.0))


def chain_of(pieces: Iterable[bytes], root: bytes = b"") -> list[int]:
    """Names of a prompt's pieces, each of all up to its end; `root` is what prompts must share besides."""
    found, name = [], hashlib.blake2b(root, digest_size=8).digest()
    for piece in pieces:
        name = hashlib.blake2b(name + piece, digest_size=8).digest()
        found.append(int.from_bytes(name))
    return found


def _weight(session: str, name: str) -> bytes:
    """Rendezvous hashing: a session stays where it is unless its replica goes."""
    return hashlib.blake2b(f"{session}\0{name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _bits(mask: int) -> Iterable[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _refusal(reason: str, why: str, seconds: float) -> Overloaded:
    retry_s = min(max(int(seconds) + (seconds % 1 > 0), 1), MAX_RETRY_S)
    return Overloaded(
        f"{why}; try again in {retry_s} s", retry_after_s=retry_s, scope="server", reason=reason
    )
