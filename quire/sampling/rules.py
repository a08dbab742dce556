"""Per-slot rules on single tokens: allowed ids, bad words, min_tokens, logit_bias. Knows no probabilities.

Few requests have any, so they are kept by slot in ordinary objects and cost only the rows that have them.
What depends on generated tokens stays on the device.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.errors import InvalidRequest
from quire.sampling.slots import upload
from quire.types import SamplingParams

_ANY, _NONE = -1, -2  # in a prefix: matches every token; in a tail: no token there


@dataclass(slots=True)
class BadPhrases:
    """Bad words of several tokens: the last token is banned when the ones before it were just generated."""

    prefixes: Tensor  # [N, W] int64, right-aligned, _ANY before their first token
    lasts: Tensor  # [N] int64
    tail: Tensor  # [W] int64: the newest generated tokens, _NONE where there are fewer

    def bans(self) -> Tensor:
        """What to add to the logits of `lasts` [N]."""
        hit = ((self.prefixes == self.tail) | (self.prefixes == _ANY)).all(-1)
        return torch.where(hit, -torch.inf, 0.0)


@dataclass(slots=True)
class SlotRules:
    """One slot's rules, on the device. Ids without repetition."""

    allowed: Tensor | None = None  # [A] int64
    biased: Tensor | None = None  # [B] int64, with what is added to each
    biases: Tensor | None = None  # [B] float32; -inf for bad words of one token
    late: Tensor | None = None  # [L] int64: stop tokens, banned at positions before `late_from`
    late_from: int = 0
    phrases: BadPhrases | None = None


class Rules:
    """The rules of all slots that have any."""

    def __init__(self, vocab_size: int, device: torch.device):
        self._vocab_size = vocab_size
        self._device = device
        self._by_slot: dict[int, SlotRules] = {}

    def admit(
        self,
        slot: int,
        params: SamplingParams,
        num_prompt: int,
        outputs: Sequence[int],
        stop_token_ids: Collection[int],
        bad_words: Sequence[Sequence[int]],
    ) -> bool:
        """Set a slot's rules; says whether it has any.

        Raises:
            InvalidRequest: a token id is not in the vocabulary.
        """
        rules = SlotRules(late_from=num_prompt + params.min_tokens)
        if params.allowed_token_ids is not None:
            rules.allowed = self._ids("allowed_token_ids", dict.fromkeys(params.allowed_token_ids))
        self._set_biases(rules, params.logit_bias or {}, [word[0] for word in bad_words if len(word) == 1])
        stops = [token for token in dict.fromkeys(stop_token_ids) if 0 <= token < self._vocab_size]
        if stops and len(outputs) < params.min_tokens:
            rules.late = self._ids("stop_token_ids", stops)
        phrases = [word for word in bad_words if len(word) > 1]
        if phrases:
            rules.phrases = self._phrases(phrases, outputs)
        parts = (rules.allowed, rules.biased, rules.late, rules.phrases)
        if all(part is None for part in parts):
            return False
        self._by_slot[slot] = rules
        return True

    def release(self, slot: int) -> None:
        self._by_slot.pop(slot, None)

    def apply(self, logits: Tensor, rows: Sequence[int], slots: Sequence[int], positions: Tensor) -> None:
        """Apply the rules of `slots` to `logits[rows]` in place; `positions` [R] is of the whole batch."""
        mine = [(row, self._by_slot[slot]) for row, slot in zip(rows, slots, strict=True)]
        self._keep_allowed(logits, [(row, rules.allowed) for row, rules in mine if rules.allowed is not None])
        at: list[int] = []
        ids: list[Tensor] = []
        added: list[Tensor] = []

        def add(row: int, tokens: Tensor, values: Tensor) -> None:
            at.append(row)
            ids.append(tokens)
            added.append(values)

        for row, rules in mine:
            if rules.biased is not None and rules.biases is not None:
                add(row, rules.biased, rules.biases)
            if rules.late is not None:
                ban = torch.where(positions[row] < rules.late_from, -torch.inf, 0.0)
                add(row, rules.late, ban.expand(len(rules.late)))
            if rules.phrases is not None:
                add(row, rules.phrases.lasts, rules.phrases.bans())
        if at:
            logits.index_put_((self._repeat(at, ids), torch.cat(ids)), torch.cat(added), accumulate=True)

    def note(self, rows: Sequence[int], slots: Sequence[int], token_ids: Tensor) -> None:
        """Remember the tokens [R] that the slots' rows were given."""
        for row, slot in zip(rows, slots, strict=True):
            phrases = self._by_slot[slot].phrases
            if phrases is not None:
                phrases.tail = torch.cat((phrases.tail[1:], token_ids[row : row + 1]))

    def _keep_allowed(self, logits: Tensor, allowed: list[tuple[int, Tensor]]) -> None:
        if not allowed:
            return
        ids = [tokens for _, tokens in allowed]
        at = (self._repeat([row for row, _ in allowed], ids), torch.cat(ids))
        kept = logits[at]
        # A NaN anywhere must still be seen, also where it is not allowed: the row's forward pass was wrong.
        rows = upload([row for row, _ in allowed], torch.int64, self._device)
        logits[rows] = torch.where(logits[rows].isnan(), torch.nan, -torch.inf)
        logits[at] = kept

    def _repeat(self, rows: Sequence[int], ids: Sequence[Tensor]) -> Tensor:
        """Each row number as often as its tensor is long."""
        repeated = [row for row, tokens in zip(rows, ids, strict=True) for _ in range(len(tokens))]
        return upload(repeated, torch.int64, self._device)

    def _ids(self, name: str, tokens: Iterable[int]) -> Tensor:
        for token in tokens:
            if not 0 <= token < self._vocab_size:
                raise InvalidRequest(
                    f"{name} has token id {token}; the vocabulary ends at {self._vocab_size - 1}", param=name
                )
        return upload(list(tokens), torch.int64, self._device)

    def _set_biases(self, rules: SlotRules, bias: Mapping[int, float], banned: Sequence[int]) -> None:
        self._ids("bad_words", banned)
        added = dict(bias) | dict.fromkeys(banned, float("-inf"))
        if added:
            rules.biased = self._ids("logit_bias", added)
            rules.biases = upload(list(added.values()), torch.float32, self._device)

    def _phrases(self, phrases: Sequence[Sequence[int]], outputs: Sequence[int]) -> BadPhrases:
        width = max(len(phrase) for phrase in phrases) - 1
        prefixes = [[_ANY] * (width + 1 - len(phrase)) + list(phrase[:-1]) for phrase in phrases]
        tail = [_NONE] * (width - len(outputs)) + list(outputs[-width:])
        return BadPhrases(
            upload(torch.tensor(prefixes), torch.int64, self._device),
            self._ids("bad_words", [phrase[-1] for phrase in phrases]),
            upload(tail, torch.int64, self._device),
        )
