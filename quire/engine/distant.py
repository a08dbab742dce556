"""A keeper that is in another process, as a worker sees it. Knows no HTTP and no device."""

import asyncio

from quire.engine.events import Submission
from quire.engine.keeper import Client
from quire.engine.link import Link
from quire.engine.service import Status
from quire.engine.wire import (
    Abort,
    Add,
    Ended,
    Facts,
    Message,
    News,
    Ready,
    Turned,
    WireError,
    error_of,
)
from quire.errors import EngineDead


class DistantKeeper:
    """See `Keeping`. Whoever has the link passes on what concerns requests, with `obey`.

    Args:
        prefix: of the names of this worker's requests; no other worker ever had it.
    """

    def __init__(self, prefix: str, link: Link):
        self.prefix, self.link = prefix, link
        self.status = Status.STARTING
        self.dead: EngineDead | None = None
        self.facts: asyncio.Future[Facts] = asyncio.get_running_loop().create_future()
        self.client: Client | None = None

    async def start(self) -> Facts:
        """See `Keeping`."""
        return await asyncio.shield(self.facts)

    def add(self, submission: Submission, client: Client) -> None:
        """See `Keeping`."""
        self.client, name = client, submission.request_id
        try:
            self.link.send(Add(submission))
        except WireError as error:  # too large, for example
            client.failed(name, error)

    def abort(self, name: str, index: int | None = None) -> None:
        """See `Keeping`."""
        self.link.send(Abort(name, index))

    def close(self, error: EngineDead) -> None:
        """See `Keeping`; the link is left to its owner."""
        self.dead, self.status = self.dead or error, Status.DEAD

    def obey(self, message: Message) -> None:
        """Take in what the keeper said.

        Raises:
            WireError: it is nothing that concerns requests.
        """
        match message:
            case News(events):
                if self.client is not None:
                    self.client.heard(events)
            case Ended(name, kind, text, details):
                if self.client is not None:
                    self.client.failed(name, error_of(kind, text, details))
            case Ready(facts):
                self.facts.set_result(facts)
                self.status = Status.READY
            case Turned(status, error):
                self._turn(Status(status), None if error is None else EngineDead(error))
            case _:
                raise WireError(f"a {type(message).__name__} is not expected now")

    def _turn(self, status: Status, error: EngineDead | None) -> None:
        if self.dead is not None:
            return
        self.status = status
        if status is Status.DEAD:
            self.dead = error or EngineDead("the engine stopped")
            if not self.facts.done():
                self.facts.set_exception(self.dead)
