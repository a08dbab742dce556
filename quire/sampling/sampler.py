"""Chooses the next token of every row of a batch. Knows slots and parameters; no models, blocks or schedules.

The order is vLLM's:

    raw log probabilities
    what a grammar allows
    allowed_token_ids, bad_words, min_tokens, logit_bias
    penalties: repetition (prompt and outputs), frequency, presence (outputs)
    greedy rows: argmax
    others:      temperature, min_p, top_k, top_p, then Gumbel-max

Nothing here waits for a device. The noise is keyed by (seed, position), so a sequence draws the same tokens
in any batch, in any slot, and after any preemption or replay.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quire.grammar.matchers import Allowed
from quire.parallel.vocabulary import Vocabulary
from quire.sampling import penalties, rules
from quire.sampling.draw import draw
from quire.sampling.logprobs import Logprobs, compute, unpack
from quire.sampling.masks import Masks, exclude
from quire.sampling.slots import NO_LOGPROBS, SlotParams, Stops, Uses, upload
from quire.types import SamplingParams, TokenLogprobs

EXTRAS = Uses.RULES | Uses.PENALTIES
CHANGES = EXTRAS | Uses.MASKS  # of the logits
FIXED_LOGPROBS = 20  # what OpenAI's protocol allows, and what a graph computes if any row asks for some


@dataclass(frozen=True, slots=True)
class HostSampled:
    """`Sampled` as plain values. `bad` rows failed: their token means nothing."""

    token_ids: list[int]
    bad: list[bool]
    logprobs: list[TokenLogprobs | None]  # None for rows that did not ask


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens of a batch of R rows, on the device."""

    token_ids: Tensor  # [R] int64; 0 in bad rows
    bad: Tensor  # [R] bool: the row's logits hold NaN or infinity, or nothing that may be sampled
    logprobs: tuple[Logprobs, ...]  # one for each k that some row asks for

    def pack(self) -> Tensor:
        """All values in one int32 tensor, to be copied to the host at once."""
        parts = [self.token_ids.int(), self.bad.int(), *(group.pack() for group in self.logprobs)]
        return torch.cat(parts)

    def unpack(self, packed: Tensor) -> HostSampled:
        """Plain values from a copy of `pack()` on the host."""
        num_rows = len(self.token_ids)
        token_ids, bad = packed[:num_rows].tolist(), packed[num_rows : 2 * num_rows].tolist()
        logprobs: list[TokenLogprobs | None] = [None] * num_rows
        rows = [row for group in self.logprobs for row in group.rows]
        reports = unpack(packed[2 * num_rows :], [group.shape for group in self.logprobs])
        for row, report in zip(rows, reports, strict=True):
            logprobs[row] = report
        return HostSampled(token_ids, [flag != 0 for flag in bad], logprobs)

    def to_host(self) -> HostSampled:
        """Plain values; waits for the device."""
        return self.unpack(self.pack().cpu())


class Sampler:
    """Sampling state of all slots. Not thread-safe: one step loop drives it."""

    def __init__(self, vocabulary: Vocabulary, tokens: Tensor):
        """`vocabulary`: of which this rank has logits of some; all ranks are called with the same slots.

        `tokens` [num_slots + 1, length] int32: each slot's, which others write, and the last one nobody's.
        """
        self._vocabulary, self._tokens, self._device = vocabulary, tokens, tokens.device
        self._params = SlotParams(vocabulary.size, len(tokens) - 1, tokens.device)
        self._masks = Masks(len(tokens))

    @property
    def stops(self) -> Stops:
        """Which tokens end the slots' sequences, for others to look after."""
        return self._params.stops

    def admit(
        self,
        slot: int,
        params: SamplingParams,
        *,
        seed: int,
        prompt: Sequence[int],
        outputs: Sequence[int],
        stop_token_ids: Collection[int],
        bad_words: Sequence[Sequence[int]],
    ) -> None:
        """A sequence takes a slot, with the outputs it has so far: some, if it was preempted before.

        `seed` is a signed 64-bit integer. `stop_token_ids` end the sequence, and are not sampled before
        `params.min_tokens` outputs. `bad_words` are the token sequences of `params.bad_words`: a single token is
        never sampled, the last token of a longer one not right after the others.

        Raises:
            InvalidRequest: a token id is outside the vocabulary; the slot is left empty.
        """
        self.release(slot)
        vocabulary, num_prompt = self._vocabulary, len(prompt)
        ends = [token for token in stop_token_ids if 0 <= token < vocabulary.size]
        first_end = num_prompt + max(params.min_tokens - 1, 0)
        self._params.write(
            slot,
            params,
            seed,
            stops=(np.array([len(ends), *sorted(ends)], np.int32) if ends else None, first_end),
            rules=rules.record_of(params, vocabulary, num_prompt, len(outputs), ends, bad_words),
            penalties=penalties.record_of(params, vocabulary.own, prompt, outputs),
        )

    def release(self, slot: int) -> None:
        """The slot's sequence is gone; releasing an empty slot does nothing."""
        self._params.clear(slot)

    def sample(
        self,
        logits: Tensor,
        slots: Sequence[int],
        positions: Sequence[int] | Tensor,
        allowed: Allowed | None = None,
    ) -> Sampled:
        """Choose a token for each row and count it in its slot's state.

        `logits` [R, own] float32 are the model's; they may be overwritten. `positions` [R] are the chosen tokens'
        indices in their sequences: the prompt's length for the first output. A slot appears at most once. `allowed`:
        what grammars let rows have.
        """
        self._params.flush()
        where, at = self._upload(slots, positions)
        uses = self._params.uses[slots]
        union = Uses(int(np.bitwise_or.reduce(uses, initial=0))) | self.mask(allowed)
        asked = self._logprob_rows(slots) if union & Uses.LOGPROBS else {}
        index = {k: self._index(rows, len(slots)) for k, rows in asked.items()}
        raw = {k: logits[rows] for k, rows in index.items()}
        if union & CHANGES:  # nothing else writes to the logits, and a slice of them is no copy
            raw = {k: own.clone() if isinstance(index[k], slice) else own for k, own in raw.items()}
        token_ids, bad = self._choose(logits, where, at, union)
        groups = [
            compute(raw[k], token_ids[index[k]], k, rows, self._vocabulary) for k, rows in asked.items()
        ]
        self._count(where, token_ids, union)
        return Sampled(token_ids, bad, tuple(groups))

    def mask(self, allowed: Allowed | None) -> Uses:
        """What grammars let the rows of the coming step have; what `sample_fixed` needs to see to it."""
        if allowed is None:
            return Uses(0)
        self._masks.put(allowed)
        return Uses.MASKS

    def fixed_uses(self, slots: Sequence[int]) -> Uses | None:
        """What the slots need of `sample_fixed`, or None where it does not do it; sends what has changed of them.

        There are two ways to draw: what is left of a filter that no row uses costs less than graphs of its absence.
        Rules and penalties come together for the same reason, but are not always there: three kernels that do nothing
        cost some microseconds, and copies of the logits for log probabilities more.
        """
        self._params.flush()
        uses = self._params.uses[slots]
        union = Uses(int(np.bitwise_or.reduce(uses, initial=0)))
        if union & Uses.LOGPROBS:
            wanted = self._params.num_logprobs[slots]
            if wanted.max() > FIXED_LOGPROBS or (wanted == -1).any():
                return None
        for together in (EXTRAS, Uses.RANDOM | Uses.FILTERS):
            union |= together if union & together else Uses(0)
        return union

    def sample_fixed(self, logits: Tensor, slots: Tensor, positions: Tensor, uses: Uses) -> Sampled:
        """`sample` for slots [R] int64 that only the device knows, which need no more than `uses`.

        What it does depends on shapes and on `uses` alone, so that a CUDA graph can hold it. Log probabilities are of
        FIXED_LOGPROBS tokens, for every row. Nobody's slot may appear more than once.
        """
        scored = bool(uses & Uses.LOGPROBS)
        raw = logits.clone() if scored and uses & CHANGES else logits
        token_ids, bad = self._choose(logits, slots, positions, uses)
        rows = range(len(token_ids))
        groups = (compute(raw, token_ids, FIXED_LOGPROBS, rows, self._vocabulary),) if scored else ()
        self._count(slots, token_ids, uses)
        return Sampled(token_ids, bad, groups)

    def _choose(self, logits: Tensor, slots: Tensor, positions: Tensor, uses: Uses) -> tuple[Tensor, Tensor]:
        """Tokens [R] and bad rows [R]; the logits are overwritten."""
        kept = self._params.kept
        if uses & Uses.MASKS:
            exclude(logits, self._masks, self._vocabulary)
        if uses & Uses.RULES:
            rules.restrict(logits, slots, positions, self._tokens, kept.rules)
        if uses & Uses.PENALTIES:
            penalties.penalise(logits, slots, kept.penalties)
        token_ids, bad = draw(logits, self._params.controls(slots, positions, uses), self._vocabulary)
        return token_ids, bad

    def _count(self, slots: Tensor, token_ids: Tensor, uses: Uses) -> None:
        """Last of all: what failed before this can be done again."""
        if uses & Uses.PENALTIES:
            penalties.count(slots, token_ids, self._params.kept.penalties, self._vocabulary.own)

    def num_logprobs(self, slots: Sequence[int]) -> list[int | None]:
        """How many each slot's sequence asks for, next to the chosen token's own; None for none at all."""
        return [None if num == NO_LOGPROBS else int(num) for num in self._params.num_logprobs[slots].tolist()]

    def _upload(self, slots: Sequence[int], positions: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Slots and positions on the device, in one copy where both are lists."""
        if isinstance(positions, Tensor):
            return upload(slots, torch.int64, self._device), upload(positions, torch.int64, self._device)
        both = upload([list(slots), list(positions)], torch.int64, self._device)
        return both[0], both[1]

    def _index(self, rows: Sequence[int], num_rows: int) -> Tensor | slice:
        """What selects `rows`; all of them without a copy."""
        return slice(None) if len(rows) == num_rows else upload(rows, torch.int64, self._device)

    def _logprob_rows(self, slots: Sequence[int]) -> dict[int, list[int]]:
        """The rows that ask for log probabilities, by how many."""
        asked: dict[int, list[int]] = {}
        wanted = self._params.num_logprobs[slots]
        for row in np.flatnonzero(wanted >= -1).tolist():
            asked.setdefault(int(wanted[row]), []).append(row)
        return asked
