"""What a server needs of an engine, wherever that runs. Knows no HTTP and no device."""

from collections.abc import AsyncGenerator
from enum import Enum
from typing import Protocol

from quire.engine.inputs import InputProcessor
from quire.engine.metrics import Metrics
from quire.types import Request, RequestOutput


class Status(Enum):
    """Whether an engine takes requests. A restart loses none: they wait, and go on where they were."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"
    DEAD = "dead"


class Service(Protocol):
    """An engine as the server sees it."""

    @property
    def inputs(self) -> InputProcessor:
        """Prompts to requests; there once `status` has left STARTING."""

    @property
    def status(self) -> Status: ...

    @property
    def metrics(self) -> Metrics: ...

    def stream(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """Run a request; yields outputs as its `output_kind` says. Leaving the iterator early aborts it.

        Raises:
            InvalidRequest: it can never be served, or its id is in use.
            EngineDead: the engine stopped for good.
        """

    async def abort(self, request_id: str) -> None:
        """End a request's stream with `finish_reason="abort"`; unknown ids are ignored."""
