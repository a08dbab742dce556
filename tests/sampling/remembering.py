"""A sampler with the tokens of its slots, which otherwise the runner keeps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quire.parallel.vocabulary import Vocabulary
from quire.sampling.sampler import Sampled, Sampler
from quire.sampling.slots import upload

CPU = torch.device("cpu")


class Remembering(Sampler):
    """Takes down what slots start with and what is sampled for them, at positions below 256."""

    def __init__(self, vocabulary: int | Vocabulary, num_slots: int, device: torch.device = CPU):
        self.tokens = torch.zeros(num_slots + 1, 256, dtype=torch.int32, device=device)
        super().__init__(Vocabulary(vocabulary) if isinstance(vocabulary, int) else vocabulary, self.tokens)

    def admit(
        self, slot: int, *args: Any, prompt: Sequence[int], outputs: Sequence[int], **named: Any
    ) -> None:
        super().admit(slot, *args, prompt=prompt, outputs=outputs, **named)
        known = [*prompt, *outputs]
        self.tokens[slot, : len(known)] = torch.tensor(known, dtype=torch.int32)

    def sample(self, logits: Tensor, slots: Sequence[int], positions: Sequence[int] | Tensor) -> Sampled:
        sampled = super().sample(logits, slots, positions)
        where, at = (upload(x, torch.int64, self.tokens.device) for x in (slots, positions))
        self.tokens[where, at] = sampled.token_ids.int()
        return sampled
