"""Keeps everybody's open requests and one engine group that computes them. Knows token ids, no text and no HTTP.

A restart of the group is a pause: every request goes on with the token after its last. Which requests wait, which are
refused, which are suspected of killing the group is decided here, for all frontends together.
"""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from quire.config import Config
from quire.engine.admission import Saturation
from quire.engine.events import Submission, TokenEvent
from quire.engine.journal import Entry, Journal
from quire.engine.metrics import Metrics, StepStats
from quire.engine.service import Status
from quire.engine.supervisor import GROUP, HANG_S, Supervisor
from quire.engine.wire import Abort, Add, Batch, Events, Facts, Launch, Message, Refused, Reset
from quire.errors import EngineCrash, EngineDead, InvalidRequest, Overloaded, QuireError


class Client(Protocol):
    """Whose requests are kept. Called in the keeper's event loop."""

    def heard(self, events: Sequence[TokenEvent]) -> None:
        """Take in what its requests got."""

    def failed(self, name: str, error: QuireError) -> None:
        """One of its requests is over, and never got more than it has."""


class Keeping(Protocol):
    """What a client has of a keeper, wherever that runs."""

    @property
    def status(self) -> Status: ...

    @property
    def dead(self) -> EngineDead | None:
        """Why there is no engine, and will be none."""

    prefix: str  # what the names of the client's requests begin with, so that no two clients' meet

    async def start(self) -> Facts:
        """Wait for the engine.

        Raises:
            ConfigError, ModelError, CapacityError: the model cannot be served as asked.
            EngineDead: it died while it started.
        """

    def add(self, submission: Submission, client: Client) -> None:
        """Compute a request; whatever is wrong with it, `Client.failed` says, perhaps before this returns."""

    def abort(self, name: str, index: int | None = None) -> None:
        """A request is over, or one of its sequences; unknown ones are ignored."""

    def close(self, error: EngineDead) -> None:
        """Fail what is open, and let go of everything."""


class Keepers(Keeping, Protocol):
    """What the main process has of a keeper besides: of one engine group, or of several."""

    metrics: Metrics
    clock: Callable[[], float]
    changed: asyncio.Event  # set whenever the status of a group changes; whoever waits clears it

    def cancel(self, label: str, error: QuireError) -> int:
        """Fail the requests of the call that users call so; returns how many there were."""

    def reset_prefix_cache(self) -> None:
        """Requests that come from now on find nothing of what was computed before."""

    def replace(self) -> bool:
        """Replace the engine's processes; requests go on in the next ones. False: none is ready for that."""

    def forget(self, client: Client) -> None:
        """A client is gone, and wants nothing any more."""

    def entries(self) -> Iterator[tuple[str, Entry, bool]]:
        """Open requests: name, what is known, and whether it takes part in the latest step."""

    @property
    def options(self) -> Mapping[str, Any]:
        """Of `Config`, as they were resolved."""

    @property
    def pids(self) -> list[int]:
        """The engine's processes."""

    @property
    def num_restarts(self) -> int:
        """How many times a process was replaced."""

    @property
    def num_replayed(self) -> int:
        """How many times a request went on in a new process."""


class Admits(Protocol):
    """What a keeper needs of `Admission`."""

    def admit(
        self, name: str, tenant: str, num_prompt_tokens: int, num_sequences: int, now: float
    ) -> None: ...

    def entered(self, name: str, now: float) -> None: ...

    def generated(self, name: str, num_tokens: int = 1) -> None: ...

    def left(self, name: str, now: float) -> None: ...

    def computed(self, stats: StepStats, now: float) -> None: ...

    def restarted(self, now: float) -> None: ...

    def share(self, tenant: str) -> float: ...

    def saturation(self, now: float) -> Saturation: ...


class Keeper:
    """One engine group for many clients. All calls come from one event loop; `start` comes first.

    Args:
        config: options of the engine.
        number: of the group, if there are others.
        metrics: observes steps, restarts and refusals.
        admission: refuses requests that would wait for too long; None refuses nobody.
        hang_s: how long the process may be silent before it counts as hung; more if its steps take long.
        entry: a module whose `main(socket)` is the life of that process.
        changed: of all groups, if there are others.
        abandon: told when there will be no process any more, and before requests fail of it; they may be surrendered.
    """

    prefix = ""

    def __init__(
        self,
        config: Config,
        metrics: Metrics,
        *,
        number: int = 0,
        admission: Admits | None = None,
        hang_s: float = HANG_S,
        entry: str = GROUP,
        clock: Callable[[], float] = time.monotonic,
        changed: asyncio.Event | None = None,
        abandon: Callable[[], None] | None = None,
    ):
        self.metrics, self.admission, self.clock, self.abandon = metrics, admission, clock, abandon
        self.journal = Journal()
        self.clients: dict[str, Client] = {}  # by the name of an open request
        options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        self.supervisor = Supervisor(Launch(options, number), self, hang_s=hang_s, entry=entry, clock=clock)
        self.status, self.replacing = Status.STARTING, False
        self.dead: EngineDead | None = None
        self.changed = changed or asyncio.Event()

    async def start(self) -> Facts:
        """See `Keeping`."""
        facts = await self.supervisor.start()
        self.metrics.configured(Config(**facts.options), facts.num_blocks)
        self._turn(Status.READY)
        return facts

    def add(self, submission: Submission, client: Client) -> None:
        """See `Keeping`."""
        name, tenant = submission.request_id, submission.tenant
        if self.dead is not None:
            return client.failed(name, self.dead)
        if self.admission is not None:
            num_tokens, num_sequences = len(submission.prompt_token_ids), submission.params.n
            try:
                self.admission.admit(name, tenant, num_tokens, num_sequences, self.clock())
            except Overloaded as error:
                self.metrics.rejected(error.reason)
                return client.failed(name, error)
            submission = dataclasses.replace(submission, share=self.admission.share(tenant))
        return self.adopt(submission, client)

    def adopt(self, submission: Submission, client: Client) -> None:
        """As `add`, of a request that was admitted already."""
        self.clients[submission.request_id] = client
        self.journal.add(submission, self.clock())
        self._send_due()

    def abort(self, name: str, index: int | None = None) -> None:
        """See `Keeping`."""
        if name in self.clients:
            self._end(name, index)
            self.supervisor.send(Abort(name, index))
            self._send_due()

    def cancel(self, label: str, error: QuireError) -> int:
        """See `Keepers`."""
        found = [n for n, e in self.journal.entries.items() if label in _labels(e.submission.label)]
        for name in found:
            self.supervisor.send(Abort(name))
            self._fail(name, error)
        self._send_due()
        return len(found)

    def reset_prefix_cache(self) -> None:
        """See `Keepers`."""
        self.supervisor.send(Reset())  # while there is no process, there is no cache

    def replace(self) -> bool:
        """See `Keepers`."""
        if self.status is not Status.READY:
            return False
        self.replacing = True
        self._turn(Status.RESTARTING)
        self.supervisor.replace()
        return True

    def forget(self, client: Client) -> None:
        """See `Keepers`."""
        for name in [name for name, owner in self.clients.items() if owner is client]:
            self.abort(name)

    def close(self, error: EngineDead) -> None:
        """See `Keeping`. Leaves no process and no socket; a second time does nothing."""
        self.gave_up(error)
        self.supervisor.kill()

    def entries(self) -> Iterator[tuple[str, Entry, bool]]:
        """See `Keepers`."""
        return ((name, entry, name in self.journal.batch) for name, entry in self.journal.entries.items())

    def surrender(self) -> list[Submission]:
        """Let go of all requests, with what they have, for another keeper to adopt; nobody is told."""
        self.clients.clear()
        return self.journal.surrender()

    @property
    def options(self) -> Mapping[str, Any]:
        """See `Keepers`."""
        return self.supervisor.launch.options

    @property
    def pids(self) -> list[int]:
        """See `Keepers`."""
        return [self.supervisor.pid]

    @property
    def num_restarts(self) -> int:
        """See `Keepers`."""
        return self.supervisor.num_restarts

    @property
    def num_replayed(self) -> int:
        """See `Keepers`."""
        return self.journal.num_replays

    def heard(self, messages: Sequence[Message]) -> bool:
        """See `Owner`: take in what the process said, then tell each client once."""
        now, progress = self.clock(), False
        news: dict[Client, list[TokenEvent]] = {}
        for message in messages:
            if isinstance(message, Events):
                for event in message.events:
                    mine = self.journal.record(event)
                    if mine is None:
                        continue
                    name = mine.request_id
                    news.setdefault(self.clients[name], []).append(mine)
                    if mine.token is not None:
                        progress = True
                        if self.admission is not None:
                            self.admission.generated(name)
                    if mine.finish is not None:
                        self._settle(name)
                self._observe(message.stats, now)
            elif isinstance(message, Batch):
                self.journal.changed(message.entered, message.left)
                if self.admission is not None:
                    for name in message.entered:
                        self.admission.entered(name, now)
            elif isinstance(message, Refused):
                self._fail(message.request_id, InvalidRequest(message.message, param=message.param))
        for client, events in news.items():
            client.heard(events)
        self._send_due()
        return progress

    def lost(self) -> None:
        """See `Owner`: the requests wait for the next process."""
        now = self.clock()
        self._turn(Status.RESTARTING)
        self.metrics.restarted(now)
        if self.admission is not None:
            self.admission.restarted(now)
        replaced, self.replacing = self.replacing, False
        for name in self.journal.crashed(on_purpose=replaced):
            self._fail(
                name, EngineCrash("the engine died each time it computed this request, so it was given up")
            )

    def found(self) -> None:
        """See `Owner`: go on."""
        self._turn(Status.READY)
        self._send_due()

    def gave_up(self, error: EngineDead) -> None:
        """See `Owner`: nothing can go on."""
        self.dead = self.dead or error
        self._turn(Status.DEAD)
        if self.abandon is not None:
            self.abandon()
        for name in list(self.clients):
            self._fail(name, error)

    def _observe(self, stats: StepStats, now: float) -> None:
        self.metrics.step(stats, now)
        if self.admission is not None:
            self.admission.computed(stats, now)
            waits = self.admission.saturation(now)
            self.metrics.saturated(waits.num_queued_reqs, waits.num_queued_tokens, waits.expected_wait_s)

    def _turn(self, status: Status) -> None:
        self.status = status
        self.changed.set()

    def _send_due(self) -> None:
        if self.status is not Status.READY:
            return
        replayed = self.journal.num_replays
        while due := self.journal.due():
            for submission in due:
                try:
                    self.supervisor.send(Add(submission))
                except QuireError as error:  # too large to be sent
                    self._fail(submission.request_id, error)
        self.metrics.replayed(self.journal.num_replays - replayed)

    def _fail(self, name: str, error: QuireError) -> None:
        client = self.clients.get(name)
        if client is not None:
            self._end(name)
            client.failed(name, error)

    def _end(self, name: str, index: int | None = None) -> None:
        self.journal.end(name, index)
        self._settle(name)

    def _settle(self, name: str) -> None:
        """Let go of a request that has ended."""
        if name not in self.journal.entries:
            del self.clients[name]
            if self.admission is not None:
                self.admission.left(name, self.clock())


def _labels(label: str) -> tuple[str, str]:
    """Of a call with several prompts, each request's label ends with its number."""
    return label, label.rpartition("-")[0]
