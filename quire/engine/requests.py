"""Open requests by id: token events in, each request's text and end out. Knows no device and no event loop."""

from collections.abc import Callable

from quire.engine.events import TokenEvent
from quire.engine.metrics import Metrics
from quire.engine.outputs import RequestState
from quire.errors import InvalidRequest
from quire.log import logger
from quire.text.tokenizer import Tokenizer
from quire.types import FinishReason, Request


class Requests:
    """What an engine keeps of its requests for their owners. `stop` is told what need not be computed any more."""

    def __init__(
        self, tokenizer: Tokenizer | None, metrics: Metrics, stop: Callable[[str, int | None], None]
    ):
        self.tokenizer, self.counts, self.stop = tokenizer, metrics.requests, stop
        self.open: dict[str, RequestState] = {}  # by name
        self.names: dict[str, str] = {}  # by id

    def add(self, request: Request, name: str | None = None) -> RequestState:
        """Open a request. `name` is what events and calls name it by, if that is not its id.

        Raises:
            InvalidRequest: its id is in use.
        """
        if request.id in self.names:
            raise InvalidRequest(f"request id {request.id!r} is in use; choose another", param="request_id")
        name = self.names[request.id] = request.id if name is None else name
        state = self.open[name] = RequestState(request, self.tokenizer)
        if request.outputs:
            state.output()  # its owner has that
        return state

    def push(self, event: TokenEvent, now: float) -> RequestState | None:
        """Take in an event; returns its request, which is open no more if that `finished` it."""
        state = self.open.get(event.request_id)
        if state is None:
            return None
        sequence = state.sequences[event.index]
        last_s = sequence.last_token_s
        if event.token is not None and not sequence.finish:
            self.counts.token(None if last_s is None else now - last_s)
        try:
            stopped = state.push(event, now)
        except Exception:  # whatever one request's text does, the others go on
            logger.exception("request %s failed while its output was read", event.request_id)
            self.stop(event.request_id, None)
            state.fail()
        else:
            if stopped:
                self.stop(event.request_id, event.index)
        if last_s is None and event.index == 0 and event.token is not None:
            self.counts.began(len(state.prompt_token_ids), event.num_cached_tokens)
        if state.finished:
            self._close(event.request_id, now)
        return state

    def abort(self, name: str, now: float) -> RequestState | None:
        """End a request with the text so far; returns it, or None if it is unknown or had ended."""
        state = self.open.get(name)
        if state is not None:
            self.stop(name, None)
            state.end(FinishReason.ABORT)
            self._close(name, now)
        return state

    def fail(self, name: str, now: float) -> None:
        """End a request that cannot be finished; its owner is told elsewhere."""
        state = self.open.get(name)
        if state is not None:
            state.fail()
            self._close(name, now)

    def drop(self, name: str) -> None:
        """Forget a request that the engine did not take."""
        state = self.open.pop(name, None)
        if state is not None:
            del self.names[state.request.id]

    def _close(self, name: str, now: float) -> None:
        state = self.open.pop(name)
        del self.names[state.request.id]
        num_generated = [len(sequence.token_ids) for sequence in state.sequences]
        reason = state.sequences[0].finish
        self.counts.finished(state.request, state.metrics, num_generated, reason, now)
