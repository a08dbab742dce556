"""Presence, frequency and repetition penalties, over counts that stay on the device. Knows no other rule.

Only slots that use a penalty hold a row of counts; a row packs (times generated) * 2 + (in the prompt).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quire.kernels.dispatch import op
from quire.sampling import cuda, native
from quire.sampling.slots import upload
from quire.types import SamplingParams


@op
def penalise(logits: Tensor, rows: Tensor, seen: Tensor, strengths: Tensor, of: Tensor) -> None:
    """Penalise `logits[rows]` [R, V] float32 in place by `seen[of]` [N, V] int32 and `strengths[of]` [N, 3].

    Columns of strengths: repetition, frequency, presence.
    """
    seen = seen[of]
    repetition, frequency, presence = strengths[of][:, :, None].unbind(1)
    chosen = logits[rows]
    repeated = torch.where(chosen > 0, chosen / repetition, chosen * repetition)
    counts = seen >> 1
    penalty = frequency * counts + presence * (counts > 0)
    logits[rows] = torch.where(seen > 0, repeated, chosen) - penalty


@penalise.on("cpu", torch.float32)
def penalise_native(logits: Tensor, rows: Tensor, seen: Tensor, strengths: Tensor, of: Tensor) -> None:
    """The compiled kernel, where there is one."""
    if not native.penalise(logits, rows, seen, strengths, of):
        penalise.reference(logits, rows, seen, strengths, of)


@penalise.on("cuda", torch.float32)
def penalise_triton(logits: Tensor, rows: Tensor, seen: Tensor, strengths: Tensor, of: Tensor) -> None:
    """The Triton kernel, where there is triton."""
    if not cuda.penalise(logits, rows, seen, strengths, of):
        penalise.reference(logits, rows, seen, strengths, of)


@op
def count(seen: Tensor, rows: Tensor, of: Tensor, token_ids: Tensor) -> None:
    """Note in `seen[of]` [N, V] int32 that `token_ids[rows]` [N] were generated; `of` names no row twice."""
    seen.index_put_((of, token_ids[rows]), torch.full_like(of, 2, dtype=torch.int32), accumulate=True)


@count.on("cuda", torch.int32)
def count_triton(seen: Tensor, rows: Tensor, of: Tensor, token_ids: Tensor) -> None:
    """The Triton kernel, where there is triton: torch would sort the indices."""
    if not cuda.count(seen, rows, of, token_ids):
        count.reference(seen, rows, of, token_ids)


class Penalties:
    """Counts and strengths by slot."""

    def __init__(self, vocab_size: int, num_slots: int, device: torch.device):
        self._vocab_size = vocab_size
        self._device = device
        self._seen = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._strengths = torch.zeros(0, 3, device=device)  # repetition, frequency, presence
        self._row = np.full(num_slots, -1, np.int64)  # slot -> row
        self._free: list[int] = []

    @staticmethod
    def wanted(params: SamplingParams) -> bool:
        """Whether any penalty is on."""
        penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        return penalties != (1, 0, 0)

    def admit(self, slot: int, params: SamplingParams, prompt: Sequence[int], outputs: Sequence[int]) -> None:
        """Start a slot's counts. Ids outside the vocabulary (placeholders of images, say) are not counted."""
        if not self._free:
            self._grow()
        row = self._row[slot] = self._free.pop()
        seen = np.bincount(self._known(outputs), minlength=self._vocab_size) * 2
        seen[self._known(prompt)] |= 1
        strengths = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        self._seen[row] = upload(torch.from_numpy(seen), torch.int32, self._device)
        self._strengths[row] = upload(strengths, torch.float32, self._device)

    def release(self, slot: int) -> None:
        if self._row[slot] >= 0:
            self._free.append(int(self._row[slot]))
            self._row[slot] = -1

    def apply(self, logits: Tensor, rows: Sequence[int], slots: Sequence[int]) -> None:
        """Penalise `logits[rows]` in place: repetition, then frequency and presence."""
        at = upload(rows, torch.int64, self._device)
        of = upload(self._row[slots].tolist(), torch.int64, self._device)
        penalise(logits, at, self._seen, self._strengths, of)

    def count(self, rows: Sequence[int], slots: Sequence[int], token_ids: Tensor) -> None:
        """Note the tokens [R] that the slots' rows were given."""
        at = upload(rows, torch.int64, self._device)
        of = upload(self._row[slots].tolist(), torch.int64, self._device)
        count(self._seen, at, of, token_ids)

    def _known(self, tokens: Sequence[int]) -> np.ndarray:
        ids = np.asarray(tokens, dtype=np.int64)
        return ids[(ids >= 0) & (ids < self._vocab_size)]

    def _grow(self) -> None:
        old = len(self._seen)
        new = min(max(4, 2 * old), len(self._row))
        self._seen = torch.cat((self._seen, self._seen.new_zeros(new - old, self._vocab_size)))
        self._strengths = torch.cat((self._strengths, self._strengths.new_zeros(new - old, 3)))
        self._free.extend(range(old, new))
