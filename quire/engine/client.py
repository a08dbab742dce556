"""The engine for asyncio programs: steps run in a thread of their own, outputs arrive as async iterators."""

import argparse
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, Self

from quire.config import Config
from quire.engine.calls import Calls
from quire.engine.engine import Engine
from quire.engine.inputs import InputProcessor
from quire.engine.metrics import Metrics
from quire.engine.service import Status
from quire.engine.stream import Stream
from quire.errors import EngineDead, InvalidRequest, QuireError
from quire.log import logger
from quire.text.tokenizer import Tokenizer
from quire.types import Prompt, Request, RequestOutput, SamplingParams

AsyncEngineArgs = Config  # vLLM's name for the options of an asynchronous engine


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
        self.calls = Calls(self.engine.inputs, self.engine.clock)
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
        request = await self.calls.request(
            lambda: (prompt, None), sampling_params, request_id, priority, tenant
        )
        async for output in self.stream(request):
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
        request = await self.calls.request(
            lambda: self.inputs.turn(messages, None, **template),
            sampling_params,
            request_id,
            priority,
            tenant,
        )
        async for output in self.stream(request):
            yield output

    async def stream(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """Run a request that `inputs.request` made; otherwise as `generate`."""
        await self.check_health()
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

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Stop requests; their iterators end with `finish_reason="abort"`. Unknown ids are ignored."""
        for name in [request_id] if isinstance(request_id, str) else list(request_id):
            self.commands.put(lambda name=name: self._abort(name))  # type: ignore[misc]

    async def reset_prefix_cache(self) -> bool:
        """Let later requests find nothing of what was computed before. Always done, hence True, as vLLM says it."""
        await self.check_health()
        self.commands.put(self.engine.core.reset_prefix_cache)
        return True

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
    def inputs(self) -> InputProcessor:
        """Turns prompts into requests."""
        return self.engine.inputs

    @property
    def metrics(self) -> Metrics:
        """Counts and times of this engine."""
        return self.engine.metrics

    @property
    def status(self) -> Status:
        """Ready, or dead."""
        return Status.READY if self.is_running else Status.DEAD

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
