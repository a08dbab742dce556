"""Outputs on their way from the engine's thread to a consumer in an event loop. Knows no engine."""

import asyncio
from collections.abc import Sequence

from quire.engine.outputs import merge_deltas
from quire.errors import QuireError
from quire.types import OutputKind, Request, RequestOutput


class Stream:
    """Outputs of one request on their way to one consumer; a slow consumer gets them merged, never lost."""

    def __init__(self, request: Request):
        self.request, self.loop = request, asyncio.get_running_loop()
        self.is_delta = request.params.output_kind is OutputKind.DELTA
        self.ready = asyncio.Event()
        self.pending: list[RequestOutput] = []
        self.error: QuireError | None = None

    def put(self, outputs: Sequence[RequestOutput], error: QuireError | None = None) -> None:
        """Hand over news; runs in the consumer's event loop."""
        self.pending += outputs
        if not self.is_delta:
            del self.pending[:-1]  # the newest holds everything
        self.error = error
        self.ready.set()

    async def get(self) -> RequestOutput:
        """Wait for news; everything since the last call in one output."""
        while not self.pending:
            if self.error is not None:
                raise self.error
            self.ready.clear()
            await self.ready.wait()
        outputs, self.pending = self.pending, []
        return merge_deltas(outputs)
