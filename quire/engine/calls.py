"""From what callers of an asynchronous engine pass to requests. Knows no engine."""

import asyncio
import itertools
from collections.abc import Callable

from quire.engine.inputs import InputProcessor
from quire.types import Prompt, Request, SamplingParams, Turn


class Calls:
    """Makes requests, numbered where they bring no id, off the event loop: tokenizing takes long at times."""

    def __init__(self, inputs: InputProcessor, clock: Callable[[], float]):
        self.inputs, self.clock = inputs, clock
        self.numbers = itertools.count()

    async def request(
        self,
        read: Callable[[], tuple[Prompt, Turn | None]],
        params: SamplingParams | None,
        request_id: str | None,
        priority: int,
        tenant: str,
    ) -> Request:
        """The request for what `read` gives, off the event loop too: a template takes long as well.

        Raises:
            InvalidRequest: it cannot be served.
        """

        def make() -> Request:
            prompt, turn = read()
            return self.inputs.request(
                prompt,
                params or self.inputs.default_params(),
                request_id=request_id or f"request-{next(self.numbers)}",
                priority=priority,
                tenant=tenant,
                arrival_s=self.clock(),
                add_special_tokens=turn is None,
                turn=turn,
            )

        return await asyncio.to_thread(make)
