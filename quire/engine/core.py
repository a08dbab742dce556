"""The half of the engine that knows the device: scheduler, step loop and runner. Knows token ids, no text."""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, NamedTuple

from quire.engine.announce import Announce, Announcer
from quire.engine.events import Submission, TokenEvent
from quire.engine.metrics import StepStats
from quire.engine.ranks import Team
from quire.errors import InvalidRequest
from quire.log import logger
from quire.runner.runner import Runner, Sampling
from quire.sampling.philox import fold
from quire.scheduler.loop import Loop
from quire.scheduler.plan import Emitted
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.sequence import NewSequence, SequenceStats
from quire.scheduler.trace import Recorder
from quire.types import FinishReason, SamplingParams

WAIT_S = 0.02  # for grammars, while there is nothing else to do but to listen to new requests


class Waiting(NamedTuple):
    """A request whose grammar is being compiled."""

    submission: Submission
    ordinal: int
    compiled: Future[Any]


class EngineCore:
    """Runs submissions step by step. All of it happens in the caller's thread."""

    def __init__(
        self,
        scheduler: Scheduler | Recorder,
        runner: Runner | Team,
        *,
        depth: int,
        seed: int,
        fingerprint: bytes,
        share_across_requests: bool,
        vocab_size: int,
        clock: Callable[[], float],
        announce: Announce | None = None,
    ):
        self.scheduler, self.runner, self.vocab_size, self.clock = scheduler, runner, vocab_size, clock
        device = runner if announce is None else Announcer(runner, lambda seq: self.owner[seq][0], announce)
        self.loop = Loop(scheduler, device, depth=depth, now=clock)
        self.seed, self.fingerprint, self.share_across_requests = seed, fingerprint, share_across_requests
        self.ids, self.ordinals, self.num_generated = itertools.count(), itertools.count(), 0
        self.owner: dict[int, tuple[str, int]] = {}  # sequence -> request and index
        self.members: dict[str, dict[int, int]] = {}  # request -> index -> sequence
        self.progress: dict[int, SequenceStats] = {}  # sequence -> what the scheduler says of it
        self.waiting: dict[str, Waiting] = {}  # requests whose grammar is being compiled

    @property
    def idle(self) -> bool:
        """Nothing waits, runs or is in flight."""
        return self.loop.idle and not self.waiting

    def add(self, submission: Submission) -> None:
        """Queue a request's sequences: all of them that have not ended, or none.

        The prompt is scored for index 0 only, and only if that starts afresh: its first token brought the scores.

        Raises:
            InvalidRequest: its id is in use, it can never fit into the cache, or it holds what is no token id.
        """
        self._check(submission, submission.outputs or ((),) * submission.params.n)
        ordinal, compiled = next(self.ordinals), None
        if submission.grammar is not None:
            compiled = self.runner.prepare(submission.grammar)
        if compiled is not None and not compiled.done():
            self.waiting[submission.request_id] = Waiting(submission, ordinal, compiled)
        else:
            self._start(submission, ordinal, compiled)

    def _start(self, submission: Submission, ordinal: int, compiled: Future[Any] | None) -> None:
        if compiled is not None:
            compiled.result()  # or what is wrong with it
        name, params = submission.request_id, submission.params
        outputs = submission.outputs or ((),) * params.n
        base = params.seed if params.seed is not None else fold(self.seed, ordinal)
        root = self._cache_root(submission, ordinal)
        unscored = params
        if params.prompt_logprobs is not None:
            unscored = dataclasses.replace(params, prompt_logprobs=None, skip_reading_prefix_cache=False)
        stops = frozenset(params.stop_token_ids or ()) | submission.eos_token_ids
        members: dict[int, int] = {}
        for index, output in enumerate(outputs):
            if output is None:
                continue
            chosen = params if index == 0 and not output else unscored
            seq, seed = next(self.ids), base if index == 0 else fold(base, index)
            self.members[name] = members
            self.owner[seq], members[index] = (name, index), seq
            self.runner.register(seq, Sampling(chosen, seed, stops, submission.bad_words, submission.grammar))
            try:
                new = _sequence(seq, submission, chosen, output, root)
                self.progress[seq] = self.scheduler.add(new, self.clock())
            except InvalidRequest:
                self.abort(name)
                raise

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Stop computing a request, or one of its sequences; unknown ones are ignored."""
        if index is None:
            self.waiting.pop(request_id, None)
        for member, seq in list(self.members.get(request_id, {}).items()):
            if index is None or index == member:
                self.scheduler.abort(seq)
                self._forget(seq)

    def step(self) -> list[TokenEvent]:
        """Compute one step; return what became known."""
        failed = self._start_waiting()
        events = [self._event(e) for e in self.loop.step() if e.seq in self.owner]
        self.num_generated += len(events)  # but for the few that only say that a sequence failed
        for event in events:
            if event.finish:
                self._forget(self.members[event.request_id][event.index])
        return failed + events

    def attend(self) -> None:
        """Take part in the step of other groups that compute in lockstep with this one, which has none."""
        if isinstance(self.runner, Team):
            self.runner.attend()

    def reset_prefix_cache(self) -> None:
        """What is cached now is never found by requests that come from now on; those that run keep theirs."""
        self.fingerprint = hashlib.blake2b(self.fingerprint, digest_size=16).digest()  # the root of all keys

    def close(self) -> None:
        """Let go of the network and the cache, and finish the trace."""
        self.runner.close()
        if isinstance(self.scheduler, Recorder):
            self.scheduler.close()

    def stats(self) -> StepStats:
        """How the scheduler and the cache stand."""
        scheduler, lookups = self.scheduler, self.scheduler.lookups
        return StepStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            used_blocks=scheduler.pool.num_used,
            num_blocks=scheduler.pool.num_blocks,
            batched_tokens=scheduler.batched_tokens,
            num_preemptions=scheduler.num_preemptions,
            cache_queries=lookups.queries,
            cache_hits=lookups.hits,
            num_parked=scheduler.num_parked,
            num_generated=self.num_generated,
            cache_misses=lookups.misses,
            prefill_tokens=scheduler.prefill_tokens,
        )

    def _start_waiting(self) -> list[TokenEvent]:
        """Start requests whose grammar is compiled by now; returns how those ended that could not be."""
        if self.waiting and self.loop.idle:
            wait([each.compiled for each in self.waiting.values()], WAIT_S, FIRST_COMPLETED)
        failed: list[TokenEvent] = []
        for name in [name for name, each in self.waiting.items() if each.compiled.done()]:
            submission = self.waiting[name].submission
            try:
                self._start(*self.waiting.pop(name))
            except Exception as error:  # whatever one request holds, the others go on
                if not isinstance(error, InvalidRequest):
                    logger.exception("request %s could not be started", name)
                    self.abort(name)
                outputs = submission.outputs or ((),) * submission.params.n
                failed += [_failure(name, i, error) for i, output in enumerate(outputs) if output is not None]
        return failed

    def _check(self, submission: Submission, outputs: tuple[tuple[int, ...] | None, ...]) -> None:
        """Refuse what would harm others once it is in a batch."""
        name, num_outputs = submission.request_id, submission.params.n
        if name in self.members or name in self.waiting:
            raise InvalidRequest(f"request id {name!r} is in use; choose another", param="request_id")
        if len(outputs) != num_outputs:
            raise InvalidRequest(f"there are outputs for {len(outputs)} sequences, and n is {num_outputs}")
        for tokens in (submission.prompt_token_ids, *outputs):
            if tokens and not (min(tokens) >= 0 and max(tokens) < self.vocab_size):
                raise InvalidRequest(
                    f"there is a token id beyond this model's, which are 0 to {self.vocab_size - 1}",
                    param="prompt",
                )

    def _cache_root(self, submission: Submission, ordinal: int) -> bytes:
        """What two requests must have in common before equal tokens mean equal KV."""
        root = hashlib.blake2b(self.fingerprint, digest_size=16)
        for text in (submission.tenant, submission.cache_salt):
            root.update(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest())
        if not self.share_across_requests:
            root.update(ordinal.to_bytes(8, "little"))
        return root.digest()

    def _event(self, emitted: Emitted) -> TokenEvent:
        request_id, index = self.owner[emitted.seq]
        seq, progress = emitted.seq, self.progress[emitted.seq]
        params, scores = self.runner.sampling[seq].params, self.runner.logprobs[seq]
        scored = params.logprobs is not None and emitted.token is not None
        misses, progress.cache_misses = progress.cache_misses, None
        return TokenEvent(
            request_id=request_id,
            index=index,
            token=emitted.token,
            logprobs=scores.popleft() if scored else None,
            finish=emitted.finish,
            stop_token=emitted.stop_token,
            error=emitted.error,
            prompt_logprobs=self.runner.take_prompt_logprobs(seq),
            num_cached_tokens=progress.num_cached_tokens,
            cache_misses=misses,
            num_preemptions=progress.num_preemptions,
            seated_s=progress.seated_s,
        )

    def _forget(self, seq: int) -> None:
        request_id, index = self.owner.pop(seq)
        members = self.members[request_id]
        del members[index]
        if not members:
            del self.members[request_id]
        self.progress.pop(seq, None)
        self.runner.forget(seq)


def _failure(name: str, index: int, error: Exception) -> TokenEvent:
    known = isinstance(error, InvalidRequest)
    why = str(error) if known else f"the request could not be started: {type(error).__name__}"
    return TokenEvent(request_id=name, index=index, token=None, finish=FinishReason.ERROR.value, error=why)


def _sequence(
    seq: int, submission: Submission, params: SamplingParams, output: tuple[int, ...], root: bytes
) -> NewSequence:
    return NewSequence(
        id=seq,
        prompt=submission.prompt_token_ids,
        max_tokens=submission.max_tokens,
        output=output,
        spans=submission.spans,
        stop_token_ids=frozenset(params.stop_token_ids or ()),
        eos_token_ids=submission.eos_token_ids,
        min_tokens=params.min_tokens,
        priority=submission.priority,
        tenant=submission.tenant,
        share=submission.share,
        cache_root=root,
        coordinates=submission.coordinates,
        read_cache=params.prompt_logprobs is None and not params.skip_reading_prefix_cache,
    )
