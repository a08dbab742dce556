"""Text in, text out, one step at a time, in the caller's thread: no socket, no process, no event loop."""

import time
from collections.abc import Callable

from quire.config import Config
from quire.engine.metrics import Metrics
from quire.engine.outputs import RequestState
from quire.engine.requests import Requests
from quire.engine.text import read_text
from quire.errors import ConfigError, EngineDead, PeerLost, QuireError
from quire.types import Request, RequestOutput


class Engine:
    """Everything `LLM` and `AsyncEngine` share.

    Raises:
        ConfigError, ModelError, CapacityError: the model cannot be served as asked.
    """

    def __init__(self, config: Config, *, offline: bool, clock: Callable[[], float] = time.monotonic):
        if config.data_parallel_size > 1:
            raise ConfigError(
                f"data_parallel_size is {config.data_parallel_size}, and in the caller's process there is one engine;"
                " leave it out, or use quire serve"
            )
        text = read_text(config)  # first: what is wrong with it shows before torch and the weights are loaded
        from quire.engine.build import build

        self.inputs, parts = build(config, text, offline=offline, clock=clock)
        self.config, self.reasons, self.spec = parts.config, parts.reasons, parts.spec
        self.core, self.tokenizer = parts.core, self.inputs.tokenizer
        self.clock = clock
        self.metrics = Metrics(config.model, log_stats=not config.disable_log_stats)
        self.metrics.configured(self.config, self.core.stats().num_blocks)
        self.requests = Requests(self.tokenizer, self.metrics, self.core.abort)
        self.closed = False

    def add(self, request: Request) -> None:
        """Queue a request that `inputs.request` made.

        Raises:
            InvalidRequest: its id is in use, or it can never fit into the cache.
            EngineDead: the engine was closed.
        """
        if self.closed:
            raise EngineDead("the engine was closed; make a new one")
        self.requests.add(request)
        try:
            self.core.add(self.inputs.submission(request))
        except QuireError:
            self.requests.drop(request.id)
            raise

    @property
    def idle(self) -> bool:
        """No request waits or runs, and nothing is left to settle."""
        return self.core.idle

    def step(self) -> list[RequestOutput]:
        """Compute one step; return an output for each request that has news and wants them now.

        Raises:
            EngineDead: another process that computes the network is gone.
        """
        try:
            events = self.core.step()
        except PeerLost as error:
            raise EngineDead(f"{error}; make a new engine") from error
        now = self.clock()
        touched: dict[str, RequestState] = {}
        for event in events:
            if (state := self.requests.push(event, now)) is not None:
                touched[event.request_id] = state
        self.metrics.step(self.core.stats(), now)
        return [state.output() for state in touched.values() if state.has_news]

    def abort(self, request_id: str) -> RequestOutput | None:
        """Stop a request; returns its last output, or None if it is unknown or had ended."""
        state = self.requests.abort(request_id, self.clock())
        return None if state is None else state.output()

    def close(self) -> None:
        """Stop every request and give back memory and files; closing twice does nothing."""
        if self.closed:
            return
        for request_id in list(self.requests.open):
            self.abort(request_id)
        self.core.close()
        self.closed = True
