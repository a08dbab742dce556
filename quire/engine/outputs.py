"""From token events to what users read: text without half characters, stop strings, log probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from quire.engine.events import TokenEvent
from quire.text.detokenize import Detokenizer
from quire.text.tokenizer import Tokenizer
from quire.types import (
    CompletionOutput,
    FinishReason,
    Logprob,
    OutputKind,
    Request,
    RequestMetrics,
    RequestOutput,
    TokenLogprobs,
)

STOP = FinishReason.STOP.value


@dataclass(slots=True)
class SequenceOutput:
    """One sequence's text so far, and how much of it was handed out."""

    index: int
    detokenizer: Detokenizer | None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish: str | None = None
    stop_reason: int | str | None = None
    sent_tokens: int = 0
    sent_chars: int = 0
    last_token_s: float | None = None

    def snapshot(self, kind: OutputKind) -> CompletionOutput:
        """Everything so far, or what is new since the last call when `kind` is DELTA."""
        delta = kind is OutputKind.DELTA
        token, char = (self.sent_tokens, self.sent_chars) if delta else (0, 0)
        self.sent_tokens, self.sent_chars = len(self.token_ids), len(self.text)
        return CompletionOutput(
            index=self.index,
            text=self.text[char:],
            token_ids=self.token_ids[token:],
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.logprobs is None else self.logprobs[token:],
            finish_reason=self.finish,
            stop_reason=self.stop_reason,
        )


class RequestState:
    """A request between its first event and its last."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None):
        params = request.params
        self.request, self.tokenizer = request, tokenizer
        self.prompt_token_ids = list(request.prompt_token_ids)  # one for all outputs: prompts are long
        self.metrics = RequestMetrics(arrival_s=request.arrival_s)
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self.num_cached_tokens, self.cache_misses = request.num_cached_tokens, request.cache_misses
        self.sequences = [self._sequence(i) for i in range(params.n)]
        for sequence, tokens in zip(self.sequences, request.outputs, strict=False):
            self._restore(sequence, tokens)

    def _sequence(self, index: int) -> SequenceOutput:
        params, detokenizer = self.request.params, None
        if self.tokenizer is not None and params.detokenize:
            detokenizer = Detokenizer(
                self.tokenizer,
                self.request.prompt_token_ids,
                skip_special_tokens=params.skip_special_tokens,
                stop=params.stop or (),
                include_stop=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
                marks=self.request.marks,
            )
        sequence = SequenceOutput(index, detokenizer)
        if params.logprobs is not None:
            sequence.logprobs, sequence.cumulative_logprob = [], 0.0
        return sequence

    @property
    def finished(self) -> bool:
        return None not in [s.finish for s in self.sequences]  # asked often, and faster than `all`

    @property
    def has_news(self) -> bool:
        """Its owner wants an output now."""
        return self.finished or self.request.params.output_kind is not OutputKind.FINAL_ONLY

    def push(self, event: TokenEvent, now: float) -> bool:
        """Take in one event; True if a stop string ended the sequence, so the engine must stop computing it."""
        sequence = self.sequences[event.index]
        if sequence.finish:
            return False  # already in flight when the sequence ended
        if self.metrics.scheduled_s is None:
            self.metrics.scheduled_s = event.seated_s
        if event.index == 0 and not sequence.token_ids:  # later ones may tell of a second start
            self.num_cached_tokens = event.num_cached_tokens
            if event.cache_misses is not None:
                self.cache_misses = event.cache_misses
            if event.prompt_logprobs is not None and self.prompt_logprobs is None:
                self.prompt_logprobs = [None, *map(self._decode, event.prompt_logprobs)]
        self.metrics.num_replays = max(self.metrics.num_replays, event.num_replays)
        self.metrics.num_preemptions = max(self.metrics.num_preemptions, event.num_preemptions)
        if event.token is not None:
            self._append(sequence, event.token, event, now)
        stop = sequence.detokenizer.stopped if sequence.detokenizer is not None else None
        if stop is not None:
            sequence.finish, sequence.stop_reason = FinishReason.STOP.value, stop
        elif event.finish:
            sequence.stop_reason = event.stop_token
            self._end(sequence, event.finish)
        return stop is not None and event.finish is None

    def end(self, reason: FinishReason) -> None:
        """End what has not ended, with the text so far."""
        for sequence in self.sequences:
            if not sequence.finish:
                self._end(sequence, reason.value)

    def fail(self) -> None:
        """End with an error what has not ended; its text stays as it is."""
        for sequence in self.sequences:
            sequence.finish = sequence.finish or FinishReason.ERROR.value

    def output(self) -> RequestOutput:
        """What the user reads now, as the request's output kind says."""
        kind = self.request.params.output_kind
        return RequestOutput(
            request_id=self.request.id,
            prompt=self.request.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[s.snapshot(kind) for s in self.sequences],
            finished=self.finished,
            prompt_logprobs=self.prompt_logprobs,
            num_cached_tokens=self.num_cached_tokens,
            cache_misses=self.cache_misses,
            metrics=self.metrics,
        )

    def _append(self, sequence: SequenceOutput, token: int, event: TokenEvent, now: float) -> None:
        sequence.token_ids.append(token)
        sequence.last_token_s = now
        self.metrics.num_generated_tokens += 1
        if self.metrics.first_token_s is None:
            self.metrics.first_token_s = now
        self.metrics.last_token_s = now
        if sequence.logprobs is not None and event.logprobs is not None:
            sequence.logprobs.append(self._decode(event.logprobs))
            sequence.cumulative_logprob = (sequence.cumulative_logprob or 0.0) + event.logprobs.logprobs[0]
        if sequence.detokenizer is not None:
            ended_by_token = event.finish == STOP
            sequence.text += sequence.detokenizer.push([token], ended_by_token=ended_by_token)

    def _restore(self, sequence: SequenceOutput, tokens: Sequence[int]) -> None:
        """Take in what another engine computed. Its log probabilities are there no more; nobody asks for them again."""
        sequence.token_ids += tokens
        if sequence.detokenizer is not None:
            sequence.text += sequence.detokenizer.push(tokens)
        if sequence.logprobs is not None:
            sequence.logprobs += [{token: Logprob(0.0, 1, None)} for token in tokens]
        if sequence.index in self.request.ended:
            sequence.finish = STOP

    def _end(self, sequence: SequenceOutput, reason: str) -> None:
        sequence.finish = reason
        if sequence.detokenizer is not None:
            sequence.text += sequence.detokenizer.finish()

    def _decode(self, scores: TokenLogprobs) -> dict[int, Logprob]:
        name = self.tokenizer.token_text if self.tokenizer is not None else lambda _: None
        rows = zip(scores.token_ids, scores.logprobs, scores.ranks, strict=True)
        return {token: Logprob(logprob, rank, name(token)) for token, logprob, rank in rows}


def merge_deltas(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """Several DELTA outputs of one request as one."""
    *earlier, last = outputs
    for output in reversed(earlier):
        for old, new in zip(output.outputs, last.outputs, strict=True):
            new.text = old.text + new.text
            new.token_ids = old.token_ids + new.token_ids
            if new.logprobs is not None:
                new.logprobs = (old.logprobs or []) + new.logprobs
    return last
