"""Carries out plans on one device: state by slot, the network, the sampler. Knows no requests and no text.

When memory runs out in a forward pass, the step is computed in halves, and so are the steps after it for a while: a
step only writes the blocks that its plan gave it, so it can be done again. Not so if layers keep states: then its
sequences begin again. What fails for one row of the sampler fails that row's sequence. Only what fails for all, or for
a single position, is the engine's own end. Where several ranks compute a step, so is whatever one of them may have met
alone: they would no longer do the same.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cache

import torch
from llguidance import LLMatcher
from torch import Tensor

from quire.attention.base import Cache
from quire.grammar.matchers import Allowed, Matchers
from quire.layers.base import Network
from quire.log import logger
from quire.runner.advance import ENDED
from quire.runner.batch import Batch, make_batch
from quire.runner.chunks import ChunkSteps
from quire.runner.fixed import FixedSteps
from quire.runner.mixed import MixedSteps
from quire.runner.pieces import PieceSize
from quire.runner.state import SlotState
from quire.runner.states import StateRows, StatesLost
from quire.sampling.logprobs import prompt_logprobs
from quire.sampling.sampler import HostSampled, Sampled, Sampler
from quire.scheduler.plan import Plan, Result, Start, Work
from quire.types import Grammar, SamplingParams, TokenLogprobs

NOT_A_NUMBER = "the network's output was not a number"
NOTHING_ALLOWED = (
    f"{NOT_A_NUMBER}, or what the grammar or thinking_token_budget allows is excluded by other parameters"
)
PROMPT_ROWS = 256  # rows whose logits are held at once when a prompt's log probabilities are computed


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a sequence is sampled. `stop_token_ids` end it, and not before `params.min_tokens`."""

    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int] = frozenset()
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: Grammar | None = None


Drawn = tuple[tuple[Work, ...], Callable[[], HostSampled]]  # rows, and a call that waits for what they got


class Runner:
    """One device's share of the engine: `launch` starts a plan's forward pass, `sample` draws its tokens."""

    def __init__(
        self,
        model: Network,
        caches: Sequence[Cache],
        state: SlotState,
        sampler: Sampler,
        *,
        grammars: Matchers,
        fixed: FixedSteps | None = None,
        mixed: MixedSteps | ChunkSteps | None = None,
        states: StateRows | None = None,
    ):
        """`fixed`, `mixed`: how steps of newest tokens, and small ones of any, are computed if not as all others.

        `states`: those of a network that keeps any.
        """
        self.model, self.caches, self.state, self.sampler = model, caches, state, sampler
        self.grammars, self.fixed, self.mixed, self.states = grammars, fixed, mixed, states
        self.sampling: dict[int, Sampling] = {}  # by sequence, from `register` to `forget`
        self.logprobs: dict[int, deque[TokenLogprobs]] = {}  # by sequence, a token each, oldest first
        self.prompt_logprobs: dict[int, list[TokenLogprobs]] = {}  # by sequence, for prompt tokens 1, 2, ...
        self.failed: dict[int, str] = {}  # sequences whose start failed, until a plan's result says so
        self.pieces = PieceSize()
        self.launched: list[tuple[Batch, Tensor]] = []  # in order, with [T, dim] of the network's output
        self.drawn: list[Drawn] = []  # what the launched plan has sampled already

    @property
    def samples(self) -> bool:
        """Whether it draws tokens: only the last of several stages does."""
        return self.model.axes.is_last_stage

    def close(self) -> None:
        """Let go of the device's memory, and of other ranks; nothing can be launched afterwards."""
        axes = self.model.axes
        if self.fixed is not None:
            self.fixed.graphs.close()
        del self.model, self.caches, self.state, self.sampler, self.fixed, self.mixed, self.states
        self.launched, self.drawn = [], []
        axes.close()

    def prepare(self, grammar: Grammar) -> Future[LLMatcher | None]:
        """Begin to compile what sequences are about to have; a step that begins one of them waits for it.

        The result raises InvalidRequest if that cannot be done.
        """
        return self.grammars.prepare(grammar)

    def register(self, seq: int, sampling: Sampling) -> None:
        """Make a sequence known before the scheduler may plan it."""
        self.sampling[seq] = sampling
        self.logprobs[seq] = deque()
        self.prompt_logprobs[seq] = []
        if sampling.grammar is not None and self.samples:
            self.grammars.register(seq, sampling.grammar)

    def take_prompt_logprobs(self, seq: int) -> tuple[TokenLogprobs, ...] | None:
        """The prompt's, if they were asked for and not taken yet; they are not computed again."""
        sampling = self.sampling[seq]
        if sampling.params.prompt_logprobs is None:
            return None
        self.sampling[seq] = replace(sampling, params=replace(sampling.params, prompt_logprobs=None))
        return tuple(self.prompt_logprobs.pop(seq))

    def forget(self, seq: int) -> None:
        """Drop what is kept for a finished sequence; plans in flight may still name it."""
        for kept in (self.sampling, self.logprobs, self.prompt_logprobs, self.failed):
            kept.pop(seq, None)
        self.grammars.forget(seq)

    def expect(self, most_rows: int) -> None:
        """How many tokens the coming step has where it has most, of groups that compute in lockstep."""
        if (spreading := self.model.build.spreading) is not None:
            spreading.most_rows = most_rows

    @torch.inference_mode()
    def idle(self) -> None:
        """Take part in a step of other groups, without tokens."""
        if (spreading := self.model.build.spreading) is not None:
            spreading.between()
            spreading.idle()

    @torch.inference_mode()
    def launch(self, plan: Plan) -> None:
        """Apply the plan's changes and start its forward pass."""
        if self.samples:
            for slot in plan.ends:
                self.sampler.release(slot)
        self.state.apply(plan)
        if self.samples:
            for start in plan.starts:
                self._admit(start)
        if self.states is not None:
            self.states.begin(plan.starts)
        self.launched, self.drawn = [], []
        free = not self.grammars.concerns(seqs := [w.seq for w in plan.work if w.samples])
        if (
            not free and self.state.tokens.device.type == "cpu"
        ):  # other devices compute while the host goes on
            self.grammars.foresee(seqs)
        if plan.work and (spreading := self.model.build.spreading) is not None:
            spreading.between()
        if plan.work and not self._launch_whole(plan.work, free):
            self._compute(plan.work)
        if self.states is not None:
            self.states.keep(plan.work)

    @torch.inference_mode()
    def sample(self, plan: Plan) -> Callable[[], Result]:
        """Draw the tokens of the launched plan; the returned call waits for them."""
        drawn = self.drawn
        for batch, hidden in self.launched:
            self._score_prompts(batch, hidden)
            if batch.sampling:
                drawn += (some := self._draw(batch, hidden))
                if not some and len(batch.sampling) > 1:
                    raise RuntimeError("no sequence of the step could be sampled; the log says why")
        lost = frozenset(w.seq for w in plan.work if self._is_lost(w))
        return lambda: self._result(plan, drawn, lost)

    def _launch_whole(self, work: tuple[Work, ...], free: bool) -> bool:
        """Start the work's step in fixed memory, with its sampling if possible; whether nothing is left to compute.

        `free`: nothing is excluded by masks, which the host makes.
        """
        try:
            return self._start_whole(work, free)
        except StatesLost:
            self._lose(work)
            return True

    def _start_whole(self, work: tuple[Work, ...], free: bool) -> bool:
        if self.fixed and self.samples and free and (fetch := self.fixed.sample(work)) is not None:
            self.drawn = [self._told(work, fetch)]
        elif self.fixed and (forwarded := self.fixed.forward(work)) is not None:
            self.launched = [forwarded]
        elif (
            self.mixed
            and free
            and not any(map(self._to_score, work))
            and not any(map(self.state.sees_ahead, work))
            and (drawn := self.mixed.sample(work))
        ):
            self.drawn = [self._told(*drawn)]
        return bool(self.drawn or self.launched)

    def _compute(self, work: Sequence[Work]) -> None:
        """The forward pass, in pieces if it must be.

        Raises:
            torch.OutOfMemoryError: there is no memory for a single position, or for a span.
        """
        spans = self.state.spans
        todo = deque(self.pieces.split(work, spans))
        while todo:
            piece = todo.popleft()
            try:
                batch = make_batch(piece, self.state, every=any(map(self._to_score, piece)))
                self.launched.append((batch, self.model(batch.token_ids, batch.ragged, self.caches)))
                continue
            except torch.OutOfMemoryError as error:
                num_positions = sum(w.count for w in piece)
                self.pieces.ran_out(num_positions)
                smaller = tuple(self.pieces.split(piece, spans))
                if len(smaller) == 1 or self.model.axes.splits(error):
                    raise
            # Outside the handler, which holds on to the tensors of the attempt.
            logger.warning("out of memory at %d positions; going on with %d", num_positions, self.pieces.most)
            if self._lose(piece):
                continue
            todo.extendleft(reversed(smaller))
        self.pieces.went_well()

    def _draw(self, batch: Batch, hidden: Tensor) -> list[Drawn]:
        """Tokens for the batch's rows: for all at once or, where that fails, for either half.

        Raises:
            torch.OutOfMemoryError: there is no memory for a single row.
        """
        rows = batch.sampling
        try:
            allowed = cache(lambda: self._allowed(rows))
            if self.fixed and (fetch := self.fixed.draw(batch, allowed)) is not None:
                return [self._told(rows, fetch)]
            logits = self.model.logits(hidden[batch.last_rows])
            positions = [w.start + w.count for w in rows]
            sampled = self.sampler.sample(logits, [w.slot for w in rows], positions, allowed())
            self.state.append(batch.slots, batch.sample_positions, sampled.token_ids)
            return [self._told(rows, cache(to_host(sampled)))]
        except Exception as error:
            if self.model.axes.splits(error):
                raise
            if len(rows) == 1:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                logger.exception("sequence %d could not be sampled", rows[0].seq)
                self.failed[rows[0].seq] = f"sampling failed: {type(error).__name__}"
                return []
            logger.warning("%d sequences could not be sampled at once: %s", len(rows), type(error).__name__)
        middle = len(rows) // 2
        parts = (slice(middle), slice(middle, None))
        return [drawn for part in parts for drawn in self._draw(batch.rows(part), hidden)]

    def _allowed(self, rows: Sequence[Work]) -> Allowed | None:
        """What grammars let these rows have, and who fails by them. Waits for their newest tokens."""
        allowed = self.grammars.allowed([w.seq for w in rows])
        if allowed is not None:
            self.failed.update(allowed.errors)
        return allowed

    def _told(self, rows: tuple[Work, ...], fetch: Callable[[], HostSampled]) -> Drawn:
        """What rows got, of which their grammars learn too."""
        self.grammars.drew((w.seq for w in rows), lambda: fetch().token_ids)
        return rows, fetch

    def _admit(self, start: Start) -> None:
        sampling = self.sampling.get(start.seq)
        if sampling is None:
            return  # aborted between planning and launching
        try:
            self.grammars.begin(start.seq, start.tokens[start.prompt_len :])
            self.sampler.admit(
                start.slot,
                sampling.params,
                seed=sampling.seed,
                prompt=start.tokens[: start.prompt_len],
                outputs=start.tokens[start.prompt_len :],
                stop_token_ids=sampling.stop_token_ids,
                bad_words=sampling.bad_words,
            )
        except Exception as error:  # one request's parameters never stop a step
            if self.model.axes.splits(error):
                raise
            logger.exception("sequence %d could not be set up", start.seq)
            self.failed[start.seq] = f"sampling could not be set up: {type(error).__name__}"

    def _score_prompts(self, batch: Batch, hidden: Tensor) -> None:
        for i, work in enumerate(batch.work):
            if not (positions := self._to_score(work)):
                continue
            num_logprobs = self.sampling[work.seq].params.prompt_logprobs or 0
            try:
                for begin in positions[::PROMPT_ROWS]:
                    end = min(begin + PROMPT_ROWS, positions.stop)
                    row = int(batch.starts[i]) + begin - work.start
                    logits = self.model.logits(hidden[row : row + end - begin])
                    targets = self.state.tokens[work.slot, begin + 1 : end + 1].long()
                    scores = prompt_logprobs(logits, targets, num_logprobs, self.model.vocabulary)
                    self.prompt_logprobs[work.seq] += scores.to_lists()
            except RuntimeError as error:  # of memory, say: the others need no scores
                if self.model.axes.splits(error):
                    raise
                logger.exception("the prompt of sequence %d could not be scored", work.seq)
                self.failed[work.seq] = f"the prompt could not be scored: {type(error).__name__}"

    def _to_score(self, work: Work) -> range:
        """The positions that tell log probabilities of the prompt that somebody waits for."""
        sampling = self.sampling.get(work.seq)
        if sampling is None or sampling.params.prompt_logprobs is None or self._is_lost(work):
            return range(0)
        done = len(self.prompt_logprobs[work.seq])  # a preempted prompt is computed twice and scored once
        last = min(work.start + work.count, self.state.prompt_len[work.slot] - 1)
        return range(max(work.start, done), last)

    def _lose(self, work: Sequence[Work]) -> bool:
        """Give up states of which some layers' have gone on, and others' have not; False if there are none."""
        if self.states is None:
            return False
        self.states.lost.update(w.slot for w in work)
        return True

    def _is_lost(self, work: Work) -> bool:
        """What was computed of it means nothing."""
        return self.states is not None and work.slot in self.states.lost

    def _result(self, plan: Plan, drawn: Sequence[Drawn], lost: frozenset[int]) -> Result:
        tokens: dict[int, tuple[int, ...]] = {}
        errors = {w.seq: self.failed.pop(w.seq) for w in plan.work if w.seq in self.failed}
        for works, fetch in drawn:
            sampled = fetch()
            rows = zip(works, sampled.token_ids, sampled.bad, sampled.logprobs, strict=True)
            for work, token, bad, scores in rows:
                if work.seq in lost:
                    continue
                if (
                    token == ENDED
                ):  # the scheduler ignores this, as it has ended the sequence too: or it does now
                    errors.setdefault(work.seq, "it had ended on the device, and not for the scheduler")
                    continue
                tokens[work.seq] = (token,)
                if bad:
                    errors.setdefault(
                        work.seq, NOTHING_ALLOWED if work.seq in self.grammars else NOT_A_NUMBER
                    )
                if scores is not None and (kept := self.logprobs.get(work.seq)) is not None:
                    kept.append(scores)
        return Result(tuple(tokens.get(w.seq, ()) for w in plan.work), errors, lost)


def to_host(sampled: Sampled) -> Callable[[], HostSampled]:
    """Start copying what was sampled; the returned call waits for the copy."""
    packed = sampled.pack()
    if packed.device.type == "cpu":
        return lambda: sampled.unpack(packed)
    copy = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    copy.copy_(packed, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> HostSampled:
        copied.synchronize()
        return sampled.unpack(copy)

    return wait
