"""The engine for asyncio programs: steps run in a thread of their own, outputs arrive as async iterators."""

import argparse
import asyncio
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, Self

from quire.config import Config
from quire.engine.engine import Engine
from quire.engine.outputs import merge_deltas
from quire.errors import EngineDead, InvalidRequest, QuireError
from quire.log import logger
from quire.text.tokenizer import Tokenizer
from quire.types import OutputKind, Prompt, Request, RequestOutput, SamplingParams

AsyncEngineArgs = Config  # vLLM's name for the options of an asynchronous engine


class Stream:
    """Outputs of one request on their way to one consumer; a slow consumer gets them merged, never lost."""

    def __init__(self, request: Request):
        self.request, self.loop = request, asyncio.get_running_loop()
        self.ready = asyncio.Event()
        self.pending: list[RequestOutput] = []
        self.error: QuireError | None = None

    def put(self, outputs: Sequence[RequestOutput], error: QuireError | None = None) -> None:
        """Hand over news; runs in the consumer's event loop."""
        self.pending += outputs
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
        delta = self.request.params.output_kind is OutputKind.DELTA
        return merge_deltas(outputs) if delta else outputs[-1]


class AsyncEngine:
    """One model, many concurrent requests, inside an asyncio program.

    `generate` may be called from any event loop. Leaving its iterator early aborts the request.

    Raises:
        ConfigError, ModelError, CapacityError: the model cannot be served as asked.
    """

    def __init__(self, config: Config):
        self.engine = Engine(config, offline=False)
        self.commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.streams: dict[str, Stream] = {}
        self.dead: EngineDead | None = None
        self.numbers = itertools.count()
        self.thread = threading.Thread(target=self._run, name="quire-engine", daemon=True)
        self.thread.start()

    @classmethod
    def from_engine_args(cls, args: Config) -> Self:
        """Start an engine with these options."""
        return cls(args)

    @classmethod
    def from_cli_args(cls, namespace: argparse.Namespace) -> Self:
        """Start an engine with parsed command-line options; names that are no options are left alone."""
        known = Config.__dataclass_fields__
        return cls(Config.of(**{k: v for k, v in vars(namespace).items() if k in known and v is not None}))

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        tenant: str = "",
    ) -> AsyncIterator[RequestOutput]:
        """Run one prompt; yields outputs as `sampling_params.output_kind` says, the last one finished.

        Raises:
            InvalidRequest: this request cannot be served; others are not affected.
            EngineDead: the engine stopped.
        """
        async for output in self._stream(
            lambda: self._request(
                prompt, sampling_params, request_id, priority, tenant, add_special_tokens=True
            )
        ):
            yield output

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        tenant: str = "",
        **template: Any,
    ) -> AsyncIterator[RequestOutput]:
        """As `generate`, for a conversation; `template` options are those of `LLM.chat`."""

        def make() -> Request:
            text = self.engine.inputs.chat_prompt(messages, None, **template)
            return self._request(
                text, sampling_params, request_id, priority, tenant, add_special_tokens=False
            )

        async for output in self._stream(make):
            yield output

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Stop requests; their iterators end with `finish_reason="abort"`. Unknown ids are ignored."""
        for name in [request_id] if isinstance(request_id, str) else list(request_id):
            self.commands.put(lambda name=name: self._abort(name))  # type: ignore[misc]

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        if self.engine.tokenizer is None:
            raise InvalidRequest("the engine was started with skip_tokenizer_init; it has no tokenizer")
        return self.engine.tokenizer

    async def check_health(self) -> None:
        """Raises EngineDead if the engine stopped."""
        if self.dead is not None:
            raise self.dead

    @property
    def is_running(self) -> bool:
        return self.thread.is_alive() and self.dead is None

    @property
    def errored(self) -> bool:
        return self.dead is not None

    def shutdown(self) -> None:
        """Abort every request and stop the engine's thread."""
        self.commands.put(None)
        self.thread.join()

    def _request(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str | None,
        priority: int,
        tenant: str,
        *,
        add_special_tokens: bool,
    ) -> Request:
        return self.engine.inputs.request(
            prompt,
            params or self.engine.inputs.default_params(),
            request_id=request_id or f"request-{next(self.numbers)}",
            priority=priority,
            tenant=tenant,
            arrival_s=self.engine.clock(),
            add_special_tokens=add_special_tokens,
        )

    async def _stream(self, make: Callable[[], Request]) -> AsyncIterator[RequestOutput]:
        await self.check_health()
        request = await asyncio.to_thread(make)  # templates and tokenizing would hold up the other streams
        stream, finished = Stream(request), False
        self.commands.put(lambda: self._add(stream))
        try:
            await self.check_health()  # the engine may have died since, and nobody reads commands any more
            while not finished:
                output = await stream.get()
                finished = output.finished
                yield output
        finally:
            if not finished:
                self.commands.put(lambda: self._abort(request.id, stream))

    def _add(self, stream: Stream) -> None:
        if self.dead is not None:
            return self._deliver(stream, [], self.dead)
        try:
            self.engine.add(stream.request)
        except QuireError as error:
            self._deliver(stream, [], error)
        else:
            self.streams[stream.request.id] = stream
        return None

    def _abort(self, request_id: str, stream: Stream | None = None) -> None:
        if stream is not None and self.streams.get(request_id) is not stream:
            return  # it ended, or never started; the id may be somebody else's now
        output = self.engine.abort(request_id)
        if output is not None:
            self._deliver(self.streams.pop(request_id), [output])

    def _run(self) -> None:
        try:
            while self._obey():
                for output in self.engine.step():
                    done = output.finished
                    stream = self.streams.pop(output.request_id) if done else self.streams[output.request_id]
                    self._deliver(stream, [output])
            error = EngineDead("the engine was shut down")
        except Exception as cause:
            logger.exception("the engine stopped")
            error = EngineDead(f"the engine stopped: {type(cause).__name__}; see the log")
        self.dead = error
        for stream in list(self.streams.values()):
            self._deliver(stream, [], error)
        self.streams.clear()
        while not self.commands.empty():
            if (command := self.commands.get()) is not None:
                command()
        self.engine.close()

    def _obey(self) -> bool:
        """Carry out what was asked for; wait for more while there is nothing to compute. False: shut down."""
        while self.engine.idle or not self.commands.empty():
            command = self.commands.get()
            if command is None:
                return False
            command()
        return True

    def _deliver(
        self, stream: Stream, outputs: Sequence[RequestOutput], error: QuireError | None = None
    ) -> None:
        try:
            stream.loop.call_soon_threadsafe(stream.put, outputs, error)
        except RuntimeError:  # the consumer's event loop is gone, and its request with it
            self.engine.abort(stream.request.id)
            self.streams.pop(stream.request.id, None)


AsyncLLMEngine = AsyncEngine  # vLLM's name
