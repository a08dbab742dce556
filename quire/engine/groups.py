"""Several engine groups behind one frontend, each with a keeper of its own: data parallelism. Knows token ids, no text.

Every group has the whole network and a cache of its own. A request goes to the one where it is expected to begin
first, and stays there: if its group dies, it waits for that group's next process, or, if there will be none, another
group goes on with it. The others' streams do not notice.
"""

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from quire.config import Config
from quire.engine.admission import Admission
from quire.engine.division import Division
from quire.engine.events import Submission, TokenEvent
from quire.engine.journal import Entry
from quire.engine.keeper import Client, Keeper
from quire.engine.metrics import Metrics, StepStats, added
from quire.engine.router import State
from quire.engine.service import Status
from quire.engine.supervisor import GROUP, HANG_S
from quire.engine.ticks import in_lockstep
from quire.engine.wire import Facts
from quire.errors import EngineDead, QuireError
from quire.log import logger

ABLE = {Status.READY: State.UP, Status.DEAD: State.DRAINING}  # others come back, and requests may wait there


class Member:
    """A client's requests at one group: passes on what they get, and notes when they begin and end."""

    def __init__(self, groups: "Groups", keeper: Keeper, client: Client):
        self.groups, self.keeper, self.client = groups, keeper, client

    def heard(self, events: Sequence[TokenEvent]) -> None:
        """See `Client`."""
        for event in events:
            if event.token is not None:
                self.groups.division.began(event.request_id)
            if event.finish is not None and event.request_id not in self.keeper.journal.entries:
                self.groups.division.ended(event.request_id)
        self.client.heard(events)

    def failed(self, name: str, error: QuireError) -> None:
        """See `Client`."""
        self.groups.division.ended(name)
        self.client.failed(name, error)


class Share:
    """What one group's keeper has of everybody's admission: to that, all groups are one engine."""

    def __init__(self, admission: Admission, latest: dict[int, StepStats], number: int):
        self.admission, self.latest, self.number = admission, latest, number
        self.admit, self.entered, self.generated = admission.admit, admission.entered, admission.generated
        self.left, self.share, self.saturation = admission.left, admission.share, admission.saturation

    def computed(self, stats: StepStats, now: float) -> None:
        """See `Admission`."""
        self.latest[self.number] = stats
        self._tell(stats.prefill_tokens, now)

    def restarted(self, now: float) -> None:
        """See `Admission`."""
        self.latest.pop(self.number, None)
        self.admission.restarted(now)
        self._tell(0, now)  # what the others counted before is not news of the next step

    def _tell(self, num_prefilled: int, now: float) -> None:
        stats = dataclasses.replace(added(self.latest.values()), prefill_tokens=num_prefilled)
        self.admission.computed(stats, now)


class Groups:
    """See `Keeping` and `Keepers`. All calls come from one event loop; `start` comes first.

    Args:
        config: options of the engine; `data_parallel_size` is how many groups there are.
        metrics: of the first group; the others add theirs to it.
        admission: refuses requests that would wait for too long; None refuses nobody.
        hang_s, entry: see `Keeper`.
    """

    prefix = ""

    def __init__(
        self,
        config: Config,
        metrics: Metrics,
        *,
        admission: Admission | None = None,
        hang_s: float = HANG_S,
        entry: str = GROUP,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.metrics, self.clock = metrics, clock
        latest: dict[int, StepStats] = {}
        self.changed = asyncio.Event()  # whenever a group's status changes
        self.keepers = [
            Keeper(
                config,
                metrics if number == 0 else Metrics(config.model, log_stats=metrics.log_stats, first=metrics),
                number=number,
                admission=None if admission is None else Share(admission, latest, number),
                hang_s=hang_s,
                entry=entry,
                clock=clock,
                changed=self.changed,
                abandon=partial(self._abandon, number),
            )
            for number in range(config.data_parallel_size)
        ]
        self.division = Division(len(self.keepers), config.seed, clock)
        self.members: dict[Client, list[Member]] = {}  # by group
        self.num_restarts_seen = [0] * len(self.keepers)
        self.started = False

    async def start(self) -> Facts:
        """See `Keeping`."""
        starting = [asyncio.create_task(keeper.start()) for keeper in self.keepers]
        try:
            first, *_ = found = await asyncio.gather(*starting)
        except BaseException:
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
            raise
        for number, facts in enumerate(found):
            self.division.holds(number, facts.num_blocks * facts.block_size)
        self.started = True
        self.changed.set()
        return first

    def add(self, submission: Submission, client: Client) -> None:
        """See `Keeping`."""
        if self.dead is not None:
            return client.failed(submission.request_id, self.dead)
        number = self._route(submission)
        return self.keepers[number].add(submission, self._member(number, client))

    def abort(self, name: str, index: int | None = None) -> None:
        """See `Keeping`."""
        ticket = self.division.tickets.get(name)
        if ticket is not None:
            keeper = self.keepers[ticket.replica]
            keeper.abort(name, index)
            if name not in keeper.journal.entries:
                self.division.ended(name)

    def cancel(self, label: str, error: QuireError) -> int:
        """See `Keepers`."""
        return sum(keeper.cancel(label, error) for keeper in self.keepers)

    def reset_prefix_cache(self) -> None:
        """See `Keepers`."""
        for keeper in self.keepers:
            keeper.reset_prefix_cache()
        self.division.forget()

    def replace(self) -> bool:
        """See `Keepers`: all that are ready, at once."""
        return sum(keeper.replace() for keeper in self.keepers) > 0  # each of them is asked

    def forget(self, client: Client) -> None:
        """See `Keepers`."""
        for member in self.members.pop(client, ()):
            for name in [name for name, owner in member.keeper.clients.items() if owner is member]:
                self.abort(name)

    def close(self, error: EngineDead) -> None:
        """See `Keeping`."""
        for keeper in self.keepers:
            keeper.abandon = None  # no group is left to go on
        for keeper in self.keepers:
            keeper.close(error)

    def entries(self) -> Iterator[tuple[str, Entry, bool]]:
        """See `Keepers`."""
        return itertools.chain.from_iterable(keeper.entries() for keeper in self.keepers)

    @property
    def status(self) -> Status:
        """Ready if a group is, once all have been; dead if all are."""
        found = {keeper.status for keeper in self.keepers}
        if found == {Status.DEAD} or (Status.DEAD in found and not self.started):
            return Status.DEAD
        if not self.started:
            return Status.STARTING
        return Status.READY if Status.READY in found else Status.RESTARTING

    @property
    def dead(self) -> EngineDead | None:
        """Why no group is left."""
        return self.keepers[-1].dead if self.status is Status.DEAD and self.started else None

    @property
    def options(self) -> Mapping[str, Any]:
        """See `Keepers`."""
        return self.keepers[0].options

    @property
    def pids(self) -> list[int]:
        """See `Keepers`."""
        return [pid for keeper in self.keepers for pid in keeper.pids]

    @property
    def num_restarts(self) -> int:
        """See `Keepers`."""
        return sum(keeper.num_restarts for keeper in self.keepers)

    @property
    def num_replayed(self) -> int:
        """See `Keepers`."""
        return sum(keeper.num_replayed for keeper in self.keepers)

    def _route(self, submission: Submission) -> int:
        """The group for a request."""
        self._look()
        return self.division.route(submission)

    def _member(self, number: int, client: Client) -> Member:
        members = self.members.setdefault(client, [Member(self, keeper, client) for keeper in self.keepers])
        return members[number]

    def _look(self) -> None:
        """Tell the router how the groups are; one with a new process has nothing cached."""
        for number, keeper in enumerate(self.keepers):
            if keeper.num_restarts != self.num_restarts_seen[number]:
                self.num_restarts_seen[number] = keeper.num_restarts
                self.division.router.turned(number, State.DOWN)
            self.division.router.turned(number, ABLE.get(keeper.status, State.DOWN))

    def _abandon(self, number: int) -> None:
        """A group will not come back: others, if there are some, go on with its requests."""
        others = [keeper for keeper in self.keepers if keeper.status is not Status.DEAD]
        if not others or not self.started:
            return
        keeper = self.keepers[number]
        logger.error("engine group %d is given up; %d are left", number, len(others))
        owners = dict(keeper.clients)
        for submission in keeper.surrender():
            member = owners[submission.request_id]
            self.division.ended(submission.request_id)
            if isinstance(member, Member):
                other = self._route(submission)
                self.keepers[other].adopt(submission, self._member(other, member.client))


def keeper_of(
    config: Config,
    metrics: Metrics,
    *,
    admission: Admission | None = None,
    hang_s: float = HANG_S,
    entry: str = GROUP,
    clock: Callable[[], float] = time.monotonic,
) -> Keeper | Groups:
    """A keeper of as many groups as the config says; see `Keeper` for the rest. Those in lockstep live as one."""
    if config.data_parallel_size == 1 or in_lockstep(config):
        return Keeper(config, metrics, admission=admission, hang_s=hang_s, entry=entry, clock=clock)
    return Groups(config, metrics, admission=admission, hang_s=hang_s, entry=entry, clock=clock)
