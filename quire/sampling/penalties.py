"""Presence, frequency and repetition penalties, over counts that stay on the device. Knows no other rule.

Only slots that use a penalty have a record:

    | repetition | frequency | presence | of each of the rank's tokens: (times generated) * 2 + (in the prompt) |
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quire.kernels.dispatch import op
from quire.sampling import cuda, native
from quire.sampling.records import Records
from quire.types import SamplingParams

HEADER = 3  # words before the counts, the bits of float32


def record_of(
    params: SamplingParams, own: range, prompt: Sequence[int], outputs: Sequence[int]
) -> np.ndarray | None:
    """A slot's record of this rank's `own` tokens; None without penalties. Others are not counted: of images, say."""
    strengths = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
    if strengths == (1, 0, 0):
        return None
    record = np.zeros(HEADER + len(own), np.int32)
    record[:HEADER] = np.array(strengths, np.float32).view(np.int32)
    seen = record[HEADER:]
    seen += 2 * np.bincount(_places(outputs, own), minlength=len(own)).astype(np.int32)
    seen[_places(prompt, own)] |= 1
    return record


@op
def penalise(logits: Tensor, slots: Tensor, records: Records) -> None:
    """Penalise `logits` [R, own] float32 in place by the records of `slots` [R] int64."""
    for row, slot in zip(logits, slots.tolist(), strict=True):
        if (record := records.of[slot]) is None:
            continue
        repetition, frequency, presence = record[:HEADER].view(torch.float32)
        seen = record[HEADER:]
        counts = seen >> 1
        repeated = torch.where(row > 0, row / repetition, row * repetition)
        row.copy_(torch.where(seen > 0, repeated, row) - (frequency * counts + presence * (counts > 0)))


@penalise.on("cpu", torch.float32)
def penalise_native(logits: Tensor, slots: Tensor, records: Records) -> None:
    """The compiled kernel, where there is one."""
    if not native.penalise(logits, slots, records.addresses):
        penalise.reference(logits, slots, records)


@penalise.on("cuda", torch.float32)
def penalise_triton(logits: Tensor, slots: Tensor, records: Records) -> None:
    """The Triton kernel, where there is triton."""
    if not cuda.penalise(logits, slots, records.addresses):
        penalise.reference(logits, slots, records)


@op
def count(slots: Tensor, token_ids: Tensor, records: Records, own: range) -> None:
    """Note that `token_ids` [R] int64 were generated, in the records of `slots` [R] int64, of which none is twice."""
    for slot, token in zip(slots.tolist(), token_ids.tolist(), strict=True):
        if (record := records.of[slot]) is not None and token in own:
            record[HEADER + token - own.start] += 2


@count.on("cuda", torch.int64)
def count_triton(slots: Tensor, token_ids: Tensor, records: Records, own: range) -> None:
    """The Triton kernel, where there is triton."""
    if not cuda.count(slots, token_ids, records.addresses, own):
        count.reference(slots, token_ids, records, own)


def _places(tokens: Sequence[int], own: range) -> np.ndarray:
    ids = np.asarray(tokens, dtype=np.int64) - own.start
    return ids[(ids >= 0) & (ids < len(own))]
