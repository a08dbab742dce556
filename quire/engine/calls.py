"""From what callers of an asynchronous engine pass to requests. Knows no engine."""

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quire.engine.inputs import InputProcessor
from quire.types import Prompt, Request, SamplingParams


class Calls:
    """Makes requests, numbered where they bring no id, off the event loop: tokenizing takes long at times."""

    def __init__(self, inputs: InputProcessor, clock: Callable[[], float]):
        self.inputs, self.clock = inputs, clock
        self.numbers = itertools.count()

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str | None,
        priority: int,
        tenant: str,
    ) -> Request:
        """A prompt as it is."""
        return await asyncio.to_thread(self._request, prompt, params, request_id, priority, tenant, True)

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None,
        request_id: str | None,
        priority: int,
        tenant: str,
        template: Mapping[str, Any],
    ) -> Request:
        """A conversation, rendered by the model's template with these options."""

        def make() -> Request:
            text = self.inputs.chat_prompt(messages, None, **template)
            return self._request(text, params, request_id, priority, tenant, False)

        return await asyncio.to_thread(make)

    def _request(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str | None,
        priority: int,
        tenant: str,
        add_special_tokens: bool,
    ) -> Request:
        return self.inputs.request(
            prompt,
            params or self.inputs.default_params(),
            request_id=request_id or f"request-{next(self.numbers)}",
            priority=priority,
            tenant=tenant,
            arrival_s=self.clock(),
            add_special_tokens=add_special_tokens,
        )
