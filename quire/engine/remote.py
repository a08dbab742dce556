"""The engine for a frontend that outlives it: the device is in a process that may die, and nobody's request with it.

Here requests have text; a keeper, in this process or in another, has their token ids and the device's process. Loads
no torch. One event loop; a consumer that does not read holds nobody up, and gets what is new in one piece.
"""

import asyncio
import dataclasses
import hashlib
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field

from quire.config import Config
from quire.engine.admission import Admission
from quire.engine.calls import Calls
from quire.engine.events import TokenEvent
from quire.engine.groups import keeper_of
from quire.engine.inputs import InputProcessor
from quire.engine.keeper import Keeping
from quire.engine.metrics import Metrics
from quire.engine.outputs import RequestState
from quire.engine.requests import Requests
from quire.engine.service import Status
from quire.engine.supervisor import GROUP, HANG_S
from quire.engine.text import read_text
from quire.engine.wire import Facts
from quire.errors import EngineDead, Overloaded, QuireError
from quire.types import Prompt, Request, RequestOutput, SamplingParams


@dataclass(slots=True, eq=False)
class Reader:
    """The consumer of one request. What is new is put together when it asks."""

    state: RequestState
    news: asyncio.Event = field(default_factory=asyncio.Event)
    error: QuireError | None = None

    async def get(self) -> RequestOutput:
        """Wait for news; everything since the last call in one output."""
        await self.news.wait()
        if self.error is not None:
            raise self.error
        self.news.clear()
        return self.state.output()


class RemoteEngine:
    """One model, many concurrent requests, in a process of its own that is started again when it dies or hangs.

    A restart is a pause: every request goes on with the token after its last, and gets what it would have got.
    All calls come from one event loop; `start` comes first.

    Args:
        config: options of the engine.
        keeper: who has the requests and the process; None makes one here, of what follows.
        admission: refuses requests that would wait for too long; None refuses nobody.
        hang_s: how long the process may be silent before it counts as hung; more if its steps take long.
        entry: a module whose `main(socket)` is the life of that process.
    """

    inputs: InputProcessor
    facts: Facts

    def __init__(
        self,
        config: Config,
        *,
        keeper: Keeping | None = None,
        admission: Admission | None = None,
        hang_s: float = HANG_S,
        entry: str = GROUP,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.config, self.clock = config, clock
        self.metrics = Metrics(config.model, log_stats=not config.disable_log_stats)
        self.readers: dict[str, Reader] = {}  # by name, which no two requests ever share
        self.numbers = itertools.count()
        self.keeper: Keeping = keeper or keeper_of(
            config, self.metrics, admission=admission, hang_s=hang_s, entry=entry, clock=clock
        )
        self.started = False

    async def start(self) -> None:
        """Wait until the engine is ready, and read meanwhile what texts need.

        Raises:
            ConfigError, ModelError, CapacityError: the model cannot be served as asked.
            EngineDead: the process died while it started.
        """
        starting = asyncio.create_task(self.keeper.start())
        try:
            text = await asyncio.to_thread(read_text, self.config)
            self.facts = await starting
        except BaseException as error:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            self.keeper.close(EngineDead(f"the engine did not start: {error}"))
            raise
        self.config = Config(**self.facts.options)
        self.inputs = text.inputs(vocab_size=self.facts.vocab_size, max_model_len=self.facts.max_model_len)
        self.calls = Calls(self.inputs, self.clock)
        self.requests = Requests(self.inputs.tokenizer, self.metrics, self.keeper.abort)
        self.started = True

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
            Overloaded: there is no room for it now; nothing of it was computed.
            RequestFailed: the engine cannot finish it; others are not affected.
            EngineDead: the engine stopped for good.
        """
        await self.check_health()
        request = await self.calls.request(
            lambda: (prompt, None), sampling_params, request_id, priority, tenant
        )
        async for output in self.stream(request):
            yield output

    async def stream(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """Run a request that `inputs.request` made; otherwise as `generate`. Leaving early aborts it."""
        await self.check_health()
        name, finished = f"{self.keeper.prefix}{next(self.numbers)}", False
        reader = self._open(name, request)
        try:
            while not finished:
                output = await reader.get()
                finished = output.finished
                yield output
        finally:
            if name in self.readers:
                self._abort(name)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Stop requests; their iterators end with `finish_reason="abort"`. Unknown ids are ignored."""
        for each in [request_id] if isinstance(request_id, str) else list(request_id):
            if (name := self.requests.names.get(each)) is not None:
                self._abort(name)

    async def check_health(self) -> None:
        """Raises EngineDead if the engine stopped for good; a restart is no reason to worry."""
        if self.keeper.dead is not None:
            raise self.keeper.dead
        if not self.started:
            raise EngineDead("the engine was not started yet; await start() first")

    def shutdown(self) -> None:
        """End every request and the process; leaves nothing behind. To be called while the event loop runs."""
        self.keeper.close(EngineDead("the engine was shut down"))

    @property
    def status(self) -> Status:
        """Whether requests are taken; see `Status`."""
        status = self.keeper.status
        return status if self.started or status is Status.DEAD else Status.STARTING

    @property
    def num_open(self) -> int:
        """Requests that have not ended, waiting ones included."""
        return len(self.readers)

    def heard(self, events: Sequence[TokenEvent]) -> None:
        """See `Client`: take in what requests got, then tell each consumer once."""
        now = self.clock()
        touched: dict[str, RequestState] = {}
        for event in events:
            if (state := self.requests.push(event, now)) is not None:
                touched[event.request_id] = state
        for name, state in touched.items():
            if state.has_news:
                self._tell(name)

    def failed(self, name: str, error: QuireError) -> None:
        """See `Client`."""
        reader = self.readers.get(name)
        if reader is not None:
            if isinstance(error, Overloaded):
                self.requests.drop(name)
            else:
                self.requests.fail(name, self.clock())
            reader.error = error
            reader.news.set()
            del self.readers[name]

    def _open(self, name: str, request: Request) -> Reader:
        submission = self.inputs.submission(request)
        params = submission.params
        if params.seed is None:  # a replay must draw the same
            params = dataclasses.replace(params, seed=_seed(self.config.seed, name))
        reader = self.readers[name] = Reader(self.requests.add(request, name))
        self.keeper.add(
            dataclasses.replace(submission, request_id=name, params=params, label=request.id), self
        )
        return reader

    def _abort(self, name: str) -> None:
        self.requests.abort(name, self.clock())
        self._tell(name)

    def _tell(self, name: str) -> None:
        reader = self.readers[name]
        reader.news.set()
        if reader.state.finished:
            del self.readers[name]


def _seed(seed: int, name: str) -> int:
    """A seed for a request that brings none: the same for the same options and order of requests."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()) >> 1
