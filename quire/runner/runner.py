"""Carries out plans on one device: state by slot, the network, the sampler. Knows no requests and no text."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.attention.base import LayerCache
from quire.layers.decoder import Decoder
from quire.log import logger
from quire.runner.batch import Batch, make_batch
from quire.runner.state import SlotState
from quire.sampling.logprobs import prompt_logprobs
from quire.sampling.sampler import HostSampled, Sampled, Sampler
from quire.scheduler.plan import Plan, Result, Start
from quire.types import SamplingParams, TokenLogprobs

PROMPT_ROWS = 256  # rows whose logits are held at once when a prompt's log probabilities are computed


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a sequence is sampled. `stop_token_ids` may not be sampled before `params.min_tokens`."""

    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int] = frozenset()
    bad_words: tuple[tuple[int, ...], ...] = ()


class Runner:
    """One device's share of the engine: `launch` starts a plan's forward pass, `sample` draws its tokens."""

    def __init__(
        self,
        model: Decoder,
        caches: Sequence[LayerCache],
        state: SlotState,
        sampler: Sampler,
        *,
        block_size: int,
    ):
        self.model, self.caches, self.state, self.sampler = model, caches, state, sampler
        self.block_size = block_size
        self.sampling: dict[int, Sampling] = {}  # by sequence, from `register` to `forget`
        self.logprobs: dict[int, deque[TokenLogprobs]] = {}  # by sequence, a token each, oldest first
        self.prompt_logprobs: dict[int, list[TokenLogprobs]] = {}  # by sequence, for prompt tokens 1, 2, ...
        self.failed: dict[int, str] = {}  # sequences whose start failed, until a plan's result says so
        self.launched: tuple[Batch, Tensor] | None = None

    def close(self) -> None:
        """Let go of the device's memory; nothing can be launched afterwards."""
        del self.model, self.caches, self.state, self.sampler
        self.launched = None

    def register(self, seq: int, sampling: Sampling) -> None:
        """Make a sequence known before the scheduler may plan it."""
        self.sampling[seq] = sampling
        self.logprobs[seq] = deque()
        self.prompt_logprobs[seq] = []

    def forget(self, seq: int) -> None:
        """Drop what is kept for a finished sequence; plans in flight may still name it."""
        for kept in (self.sampling, self.logprobs, self.prompt_logprobs, self.failed):
            kept.pop(seq, None)

    @torch.inference_mode()
    def launch(self, plan: Plan) -> None:
        """Apply the plan's changes and start its forward pass."""
        for slot in plan.ends:
            self.sampler.release(slot)
        self.state.apply(plan)
        for start in plan.starts:
            self._admit(start)
        self.launched = None
        if plan.work:
            batch = make_batch(plan.work, self.state, self.block_size)
            self.launched = batch, self.model(batch.token_ids, batch.ragged, self.caches)

    @torch.inference_mode()
    def sample(self, plan: Plan, masks: None = None) -> Callable[[], Result]:
        """Draw the tokens of the launched plan; the returned call waits for them."""
        if self.launched is None:
            return lambda: Result(())
        batch, hidden = self.launched
        self._score_prompts(plan, batch, hidden)
        if not batch.sampling:
            return lambda: self._result(plan, batch, None)
        logits = self.model.logits(hidden[batch.last_rows])
        positions = [w.start + w.count for w in batch.sampling]
        sampled = self.sampler.sample(logits, [w.slot for w in batch.sampling], positions)
        self.state.append(batch.slots, batch.sample_positions, sampled.token_ids)
        fetch = to_host(sampled)
        return lambda: self._result(plan, batch, fetch())

    def _admit(self, start: Start) -> None:
        sampling = self.sampling.get(start.seq)
        if sampling is None:
            return  # aborted between planning and launching
        try:
            self.sampler.admit(
                start.slot,
                sampling.params,
                seed=sampling.seed,
                prompt=start.tokens[: start.prompt_len],
                outputs=start.tokens[start.prompt_len :],
                stop_token_ids=sampling.stop_token_ids,
                bad_words=sampling.bad_words,
            )
        except (ValueError, RuntimeError, IndexError) as error:  # one request's parameters never stop a step
            logger.exception("sequence %d could not be set up", start.seq)
            self.failed[start.seq] = f"sampling could not be set up: {type(error).__name__}"

    def _score_prompts(self, plan: Plan, batch: Batch, hidden: Tensor) -> None:
        for i, work in enumerate(plan.work):
            sampling = self.sampling.get(work.seq)
            if sampling is None or sampling.params.prompt_logprobs is None:
                continue
            done = len(self.prompt_logprobs[work.seq])  # a preempted prompt is computed twice and scored once
            first = max(work.start, done)
            last = min(work.start + work.count, self.state.prompt_len[work.slot] - 1)
            for begin in range(first, last, PROMPT_ROWS):
                end = min(begin + PROMPT_ROWS, last)
                row = int(batch.starts[i]) + begin - work.start
                logits = self.model.logits(hidden[row : row + end - begin])
                targets = self.state.tokens[work.slot, begin + 1 : end + 1].long()
                scores = prompt_logprobs(logits, targets, sampling.params.prompt_logprobs)
                self.prompt_logprobs[work.seq] += scores.to_lists()

    def _result(self, plan: Plan, batch: Batch, sampled: HostSampled | None) -> Result:
        tokens: dict[int, tuple[int, ...]] = {}
        errors = {w.seq: self.failed.pop(w.seq) for w in plan.work if w.seq in self.failed}
        if sampled is not None:
            rows = zip(batch.sampling, sampled.token_ids, sampled.bad, sampled.logprobs, strict=True)
            for work, token, bad, scores in rows:
                tokens[work.seq] = (token,)
                if bad:
                    errors.setdefault(work.seq, "the network's output was not a number")
                if scores is not None and (kept := self.logprobs.get(work.seq)) is not None:
                    kept.append(scores)
        return Result(tuple(tokens.get(w.seq, ()) for w in plan.work), errors)


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
