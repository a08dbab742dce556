"""Text in, text out, one step at a time, in the caller's thread: no socket, no process, no event loop."""

import time
from collections.abc import Callable

from quire.config import Config
from quire.engine.build import Parts, build
from quire.engine.events import TokenEvent
from quire.engine.metrics import Metrics
from quire.engine.outputs import RequestState
from quire.errors import EngineDead, InvalidRequest
from quire.log import logger
from quire.types import FinishReason, OutputKind, Request, RequestOutput


class Engine:
    """Everything `LLM` and `AsyncEngine` share.

    Raises:
        ConfigError, ModelError, CapacityError: the model cannot be served as asked.
    """

    def __init__(self, config: Config, *, offline: bool, clock: Callable[[], float] = time.monotonic):
        parts: Parts = build(config, offline=offline, clock=clock)
        self.config, self.reasons, self.spec = parts.config, parts.reasons, parts.spec
        self.inputs, self.core, self.tokenizer = parts.inputs, parts.core, parts.tokenizer
        self.clock = clock
        self.metrics = Metrics(config.model, log_stats=not config.disable_log_stats)
        self.requests: dict[str, RequestState] = {}
        self.closed = False

    def add(self, request: Request) -> None:
        """Queue a request that `inputs.request` made.

        Raises:
            InvalidRequest: its id is in use, or it can never fit into the cache.
            EngineDead: the engine was closed.
        """
        if self.closed:
            raise EngineDead("the engine was closed; make a new one")
        if request.id in self.requests:
            raise InvalidRequest(f"request id {request.id!r} is in use; choose another", param="request_id")
        self.core.add(self.inputs.submission(request))
        self.requests[request.id] = RequestState(request, self.tokenizer)
        self.metrics.arrived(len(request.prompt_token_ids))

    @property
    def idle(self) -> bool:
        """No request waits or runs, and nothing is left to settle."""
        return self.core.idle

    def step(self) -> list[RequestOutput]:
        """Compute one step; return an output for each request that has news and wants them now."""
        events = self.core.step()
        now = self.clock()
        touched: dict[str, RequestState] = {}
        for event in events:
            if (state := self.requests.get(event.request_id)) is not None:
                self._push(state, event, now)
                touched[event.request_id] = state
        self.metrics.step(self.core.stats(), now)
        return [output for state in touched.values() if (output := self._output(state, now)) is not None]

    def abort(self, request_id: str) -> RequestOutput | None:
        """Stop a request; returns its last output, or None if it is unknown or had ended."""
        state = self.requests.get(request_id)
        if state is None:
            return None
        self.core.abort(request_id)
        state.end(FinishReason.ABORT)
        return self._output(state, self.clock())

    def close(self) -> None:
        """Stop every request and give back memory and files; closing twice does nothing."""
        if self.closed:
            return
        for request_id in list(self.requests):
            self.abort(request_id)
        self.core.close()
        self.closed = True

    def _push(self, state: RequestState, event: TokenEvent, now: float) -> None:
        if event.token is not None:
            last = state.metrics.last_token_s
            self.metrics.token(None if last is None else now - last)
        try:
            stopped = state.push(event, now)
        except Exception:  # whatever one request's text does, the others go on
            logger.exception("request %s failed while its output was read", event.request_id)
            self.core.abort(event.request_id)
            state.fail()
        else:
            if stopped:
                self.core.abort(event.request_id, event.index)

    def _output(self, state: RequestState, now: float) -> RequestOutput | None:
        if state.finished:
            del self.requests[state.request.id]
            self.metrics.finished(state.metrics, state.sequences[0].finish, now)
        elif state.request.params.output_kind is OutputKind.FINAL_ONLY:
            return None
        return state.output()
