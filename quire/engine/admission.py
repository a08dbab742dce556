"""Who may wait for the engine, and for how long. Pure: knows names and token counts, no prompts, clock or sockets.

The queue is what was admitted and takes part in no step yet. It is short in time: a request whose wait is expected to
be longer than it would be worth is refused at once, and told when to come back.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from quire.engine.metrics import StepStats
from quire.errors import Overloaded

MAX_RETRY_S = 120  # nobody can tell what is beyond
RELIEVED = 0.75  # of a limit: at that queue one that comes back finds room, and a few others too
WINDOW_S = 30.0
MIN_TOKENS, MIN_SEQUENCES = 1000, 8  # that a measurement rests on, even if they take longer than the window
LATEST = 0.1  # what the latest value counts in a running mean
MINUTE_S = 60.0
NEARLY_ALL = 0.95  # requests that are to wait no longer than the limit
MARGIN_STEP, MOST_MARGIN = 0.02, 0.5  # of the limit: the margin's pace, and the most that is kept of it


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantLimits:
    """What one tenant may have. None: no limit of its own."""

    share: float = 1.0  # of the machine, relative to other tenants that want it
    max_concurrent: int | None = None  # requests that have not ended
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts when they are admitted, and of outputs


@dataclass(frozen=True, slots=True)
class Saturation:
    """What waits now."""

    num_queued_reqs: int
    num_queued_tokens: int
    expected_wait_s: float  # of one that comes last; 0 also if nothing was measured


@dataclass(slots=True)
class Amount:
    """Something that waits, or the sum of it."""

    requests: float = 0
    tokens: float = 0
    sequences: float = 0

    def add(self, other: "Amount", times: float = 1) -> None:
        self.requests += times * other.requests
        self.tokens += times * other.tokens
        self.sequences += times * other.sequences


@dataclass(slots=True)
class Admitted:
    """A request that has not ended."""

    account: "Account"
    amount: Amount
    since_s: float
    expected_s: float | None  # how long it was expected to wait; None if nobody knew
    waits: bool = True


@dataclass(slots=True, eq=False)
class Account:
    """A tenant's requests, and what it has used up of a minute's; that is given back evenly over a minute."""

    limits: TenantLimits
    num_open: int = 0
    queued: Amount = field(default_factory=Amount)
    used_requests: float = 0.0
    used_tokens: float = 0.0
    since_s: float = 0.0

    def settle(self, now: float) -> None:
        """Give back what is due."""
        passed = max(now - self.since_s, 0.0) / MINUTE_S
        self.since_s = now
        self.used_requests = max(self.used_requests - passed * (self.limits.requests_per_minute or 0), 0.0)
        self.used_tokens = max(self.used_tokens - passed * (self.limits.tokens_per_minute or 0), 0.0)

    def charge(self, requests: float, tokens: float) -> None:
        """Charge what is limited; negative amounts give back."""
        if self.limits.requests_per_minute is not None:
            self.used_requests = max(self.used_requests + requests, 0.0)
        if self.limits.tokens_per_minute is not None:
            self.used_tokens = max(self.used_tokens + tokens, 0.0)


@dataclass(slots=True)
class Cost:
    """Seconds that a unit takes, measured over a window of such seconds, or more until it holds enough units."""

    min_units: float
    spent_s: float = 0.0
    units: float = 0.0

    def add(self, seconds: float, units: float) -> None:
        keep = math.exp(-seconds / WINDOW_S)
        if self.units * keep >= self.min_units:
            self.spent_s, self.units = self.spent_s * keep, self.units * keep
        self.spent_s += seconds
        self.units += units

    @property
    def each_s(self) -> float:
        """At least so much: a unit that is not complete counts as one. 0: nothing was measured."""
        return self.spent_s / max(self.units, 1.0)


class Speed:
    """How fast a queue empties: prompts take time by their tokens, and sequences may have to wait for seats.

    Only steps that leave somebody waiting tell. In those without a prefill there were no seats (or no blocks for
    another sequence); in the others such a step's time is as long as ever, and what is more is the prefill's. The two
    costs add up to what the queue took.
    """

    def __init__(self) -> None:
        self.token, self.sequence = Cost(MIN_TOKENS), Cost(MIN_SEQUENCES)
        self.begun_s: float | None = None  # when the step began that is being computed
        self.decode_s = 0.0  # of a step without prefill
        self.num_seats = self.num_running = self.cache_hits = 0
        self.somebody_waits = False

    def wait_s(self, tokens: float, sequences: float) -> float:
        """Seconds until so much has left the queue; 0 if nothing was measured."""
        free = max(self.num_seats - self.num_running, 0)
        return tokens * self.token.each_s + max(sequences - free, 0) * self.sequence.each_s

    def begin(self, now: float) -> None:
        """A step is about to be computed; one that follows another begins when that ends."""
        if self.begun_s is None:
            self.begun_s = now

    def seated(self, num_sequences: float) -> None:
        """So many begin in the step to come; those that waited through an earlier one count."""
        if self.somebody_waits:
            self.sequence.add(0.0, num_sequences)

    def measure(self, stats: StepStats, now: float) -> None:
        """A step has ended."""
        took_s = 0.0 if self.begun_s is None else max(now - self.begun_s, 0.0)
        self.begun_s = now if stats.num_running or stats.num_waiting else None
        found = max(stats.cache_hits - self.cache_hits, 0)
        self.num_running, self.cache_hits = stats.num_running, stats.cache_hits
        self.somebody_waits = stats.num_waiting > 0
        if not self.somebody_waits:
            return
        if stats.prefill_tokens:
            waited_s = min(took_s, self.decode_s)
            self.token.add(took_s - waited_s, stats.prefill_tokens + found)
        else:
            waited_s, self.num_seats = took_s, stats.num_running
            self.decode_s += (took_s - self.decode_s) * (LATEST if self.decode_s else 1.0)
        self.sequence.add(waited_s, 0.0)

    def interrupt(self) -> None:
        """The engine is gone; what the next one counts begins at 0."""
        self.begun_s, self.somebody_waits = None, False
        self.num_running = self.cache_hits = 0


class Margin:
    """How much longer than expected nearly every request waits, going by those of late: a running quantile.

    Args:
        limit_s: the longest wait that is allowed.
    """

    def __init__(self, limit_s: float) -> None:
        self.seconds, self.limit_s = 0.0, limit_s

    def learn(self, expected_s: float, waited_s: float) -> None:
        """A request that was expected to wait has begun."""
        longer = waited_s > expected_s + self.seconds
        change = MARGIN_STEP * self.limit_s * (NEARLY_ALL if longer else NEARLY_ALL - 1)
        self.seconds = min(max(self.seconds + change, 0.0), MOST_MARGIN * self.limit_s)


class Admission:
    """Admits requests or refuses them. `now` is seconds on one clock that never goes back.

    Tenants are served in turn, so another's long queue is ahead of a request only as far as its turn comes first. The
    limits hold for what is ahead: all together the queue of k tenants is at most 1 + 1/2 + ... + 1/k of them.

    Args:
        limits: by tenant; others have `default`.
        max_num_queued_reqs: requests that may wait ahead of one, at least 1.
        max_num_queued_tokens: their prompt tokens and its own; a prompt of any length may wait alone.
        max_queue_seconds: how long nearly every request may wait at most. Holds once waits can be told.
    """

    def __init__(
        self,
        limits: Mapping[str, TenantLimits],
        default: TenantLimits,
        max_num_queued_reqs: int,
        max_num_queued_tokens: int,
        max_queue_seconds: float,
    ):
        self.limits, self.default = dict(limits), default
        self.max_num_queued_reqs = max_num_queued_reqs
        self.max_num_queued_tokens = max_num_queued_tokens
        self.max_queue_seconds = max_queue_seconds
        self.open: dict[str, Admitted] = {}
        self.accounts: dict[str, Account] = {}
        self.speed, self.margin = Speed(), Margin(max_queue_seconds)
        self.request_s = 0.0  # that a request took of late

    def admit(self, name: str, tenant: str, num_prompt_tokens: int, num_sequences: int, now: float) -> None:
        """Queue a request and charge its tenant. No open request has the name.

        Raises:
            Overloaded: it may not wait; nothing was changed.
        """
        account = self._account(tenant, now)
        _check_tenant(account, num_prompt_tokens, self.request_s)
        expected_s = self._check_server(account, num_prompt_tokens)
        amount = Amount(1, num_prompt_tokens, num_sequences)
        self.accounts[tenant] = account
        self.open[name] = Admitted(account, amount, now, expected_s or None)
        account.num_open += 1
        account.queued.add(amount)
        account.charge(1, num_prompt_tokens)

    def entered(self, name: str, now: float) -> None:
        """A request takes part in a step; only the first time counts, and unknown ones are ignored."""
        self.speed.begin(now)
        request = self.open.get(name)
        if request is not None and request.waits:
            request.waits = False
            if request.expected_s is not None:
                self.margin.learn(request.expected_s, now - request.since_s)
            request.account.queued.add(request.amount, -1)
            self.speed.seated(request.amount.sequences)

    def generated(self, name: str, num_tokens: int = 1) -> None:
        """A request got tokens, which are charged even beyond the limit; unknown ones are ignored."""
        request = self.open.get(name)
        if request is not None:
            request.account.charge(0, num_tokens)

    def left(self, name: str, now: float) -> None:
        """A request ended, however that was; unknown ones are ignored. What never began is not charged."""
        request = self.open.pop(name, None)
        if request is None:
            return
        account = request.account
        account.num_open -= 1
        account.settle(now)
        if request.waits:
            account.queued.add(request.amount, -1)
            account.charge(-1, -request.amount.tokens)
        else:
            took_s = now - request.since_s
            self.request_s += (took_s - self.request_s) * (LATEST if self.request_s else 1.0)

    def computed(self, stats: StepStats, now: float) -> None:
        """The engine has done a step."""
        self.speed.measure(stats, now)

    def restarted(self, now: float) -> None:
        """The engine was lost. Its requests come back without being admitted again."""
        self.speed.interrupt()
        for request in self.open.values():
            request.expected_s = None  # nobody expected that

    def share(self, tenant: str) -> float:
        """A tenant's part of the machine, relative to others'."""
        return self.limits.get(tenant, self.default).share

    def saturation(self, now: float) -> Saturation:
        """What waits, of all tenants together."""
        total = Amount()
        for account in self.accounts.values():
            total.add(account.queued)
        wait_s = self.speed.wait_s(total.tokens, total.sequences)
        return Saturation(int(total.requests), int(total.tokens), wait_s)

    def _account(self, tenant: str, now: float) -> Account:
        account = self.accounts.get(tenant)
        if account is None:
            self._forget_idle(now)
            return Account(self.limits.get(tenant, self.default), since_s=now)
        account.settle(now)
        return account

    def _forget_idle(self, now: float) -> None:
        """Names of tenants may be anybody's choice, so those of whom there is nothing to know are not kept."""
        for tenant, account in list(self.accounts.items()):
            account.settle(now)
            if not (account.num_open or account.used_requests or account.used_tokens):
                del self.accounts[tenant]

    def _check_server(self, account: Account, num_tokens: int) -> float:
        """How long a request is expected to wait.

        Raises:
            Overloaded: that is too long, or too much is ahead.
        """
        ahead = self._ahead(account, num_tokens)
        wait_s = self.speed.wait_s(ahead.tokens, ahead.sequences)
        most_s = self.max_queue_seconds - self.margin.seconds
        reached: list[tuple[float, str]] = []  # when the queue will be short enough, by what limit
        for reason, waiting, added, most in (
            ("max_num_queued_reqs", ahead.requests, 1, self.max_num_queued_reqs),
            ("max_num_queued_tokens", ahead.tokens, num_tokens, self.max_num_queued_tokens),
        ):
            if waiting and waiting + added > most:
                kept = max(min(RELIEVED * most, most - added), 0)
                reached.append((wait_s * (1 - kept / waiting), reason))
        if wait_s > most_s:
            reached.append((wait_s - RELIEVED * most_s, "max_queue_seconds"))
        if reached:
            seconds, reason = max(reached)
            raise _refusal("server", reason, "the server has more requests than it can serve", seconds)
        return wait_s

    def _ahead(self, account: Account, num_tokens: int) -> Amount:
        """What is computed before a new request: its tenant's queue, and of others what comes in turn meanwhile."""
        ahead, own = Amount(), account.queued.tokens + num_tokens
        ahead.add(account.queued)
        for other in self.accounts.values():
            if other is not account and other.queued.tokens > 0:
                turn = own * other.limits.share / account.limits.share
                ahead.add(other.queued, min(turn / other.queued.tokens, 1.0))
        return ahead


def _check_tenant(account: Account, num_tokens: int, request_s: float) -> None:
    limits = account.limits
    if (most := limits.max_concurrent) is not None and account.num_open >= most:
        raise _refusal(
            "tenant", "tenant_concurrency", f"{most} requests at a time are yours", request_s / most
        )
    for reason, unit, limit, used, added in (
        ("tenant_requests", "requests", limits.requests_per_minute, account.used_requests, 1),
        ("tenant_tokens", "tokens", limits.tokens_per_minute, account.used_tokens, num_tokens),
    ):
        if (
            limit is not None and used
        ):  # what is more than a minute's needs a minute's, and is charged in full
            excess = used + min(added, limit) - limit
            if excess > 0:
                raise _refusal(
                    "tenant", reason, f"{limit} {unit} a minute are yours", excess * MINUTE_S / limit
                )


def _refusal(scope: str, reason: str, why: str, seconds: float) -> Overloaded:
    retry_s = min(max(math.ceil(seconds), 1), MAX_RETRY_S)
    message = f"{why}; try again in {retry_s} s"
    return Overloaded(message, retry_after_s=retry_s, scope=scope, reason=reason)
