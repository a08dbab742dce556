"""From a plan to the tensors of a step. Knows no network."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from quire.attention.base import Ragged, see_ahead
from quire.runner.staging import upload
from quire.runner.state import SlotState
from quire.scheduler.plan import Work


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's input: the T positions of all its work, one piece of work after another.

    `work` is what it covers. `last_rows` are, of the network's output, the rows of work that samples; `slots` and
    `sample_positions` say, on the device and for each of these rows, whose successor is sampled and where it goes.
    """

    work: tuple[Work, ...]
    token_ids: Tensor  # [T] int64
    ragged: Ragged
    starts: np.ndarray  # [S + 1] first row of each piece of work
    sampling: tuple[Work, ...]
    last_rows: Tensor  # [R] int64
    slots: Tensor  # [R] int64
    sample_positions: Tensor  # [R] int64

    def rows(self, part: slice) -> "Batch":
        """The same with some of the rows that are sampled."""
        return replace(
            self,
            sampling=self.sampling[part],
            last_rows=self.last_rows[part],
            slots=self.slots[part],
            sample_positions=self.sample_positions[part],
        )


def make_batch(work: Sequence[Work], state: SlotState, *, every: bool = True) -> Batch:
    """Gather what the work covers; one upload of indices, the tokens themselves are on the device already.

    `every`: the network's output is wanted of all rows, and not only of those that are sampled.
    """
    counts = np.array([w.count for w in work])
    begins = np.array([w.start for w in work])
    slots = np.array([w.slot for w in work])
    starts = np.concatenate(([0], np.cumsum(counts)))
    lengths = begins + counts
    sampling = [i for i, w in enumerate(work) if w.samples]
    every = every or len(sampling) == starts[-1]
    max_length = int(lengths.max())
    ahead = see_ahead([w.start for w in work], [w.count for w in work], [state.spans[w.slot] for w in work])
    row_slots, at, query_starts, of, ends, last_rows, sampled, sample_positions, *seen = upload(
        (
            np.repeat(slots, counts),
            np.arange(starts[-1]) - np.repeat(starts[:-1] - begins, counts),
            starts,
            slots,
            lengths,
            starts[1:][sampling or [0]] - 1,  # one row at least, as kernels know no empty tensors
            slots[sampling],
            lengths[sampling],
            *(() if ahead is None else ahead),
        ),
        state.tokens.device,
    )
    block_size = state.block_size
    blocks = state.tables[row_slots, at // block_size].long()
    ragged = Ragged(
        positions=at,
        slot_mapping=blocks * block_size + at % block_size,
        query_starts=query_starts.int(),
        lengths=ends.int(),
        block_tables=state.tables[of, : -(-max_length // block_size)],
        rows=of,
        max_query=int(counts.max()),
        max_length=max_length,
        mixed=int(counts.min()) == 1 < int(counts.max()),
        beside=state.beside,
        coordinates=_coordinates(work, state),
        until=seen[0].int() if seen else None,
        since=seen[1].int() if seen else None,
        wanted=None if every else last_rows,
    )
    return Batch(
        work=tuple(work),
        token_ids=state.tokens[row_slots, at].long(),
        ragged=ragged,
        starts=starts,
        sampling=tuple(work[i] for i in sampling),
        last_rows=(last_rows if every else torch.arange(len(last_rows), device=at.device))[: len(sampling)],
        slots=sampled,
        sample_positions=sample_positions,
    )


def _coordinates(work: Sequence[Work], state: SlotState) -> Tensor | None:
    """The step's, as `Ragged` has them; None if all tokens are one after another."""
    if not any(w.slot in state.coordinates for w in work):
        return None
    parts = []
    for w in work:
        first, last, own = w.start, w.start + w.count, state.coordinates.get(w.slot)
        parts.append(np.array([range(first, last)] * 3 if own is None else own.between(first, last)))
    rows = np.concatenate(parts, axis=1)
    if (rows == rows[0]).all():
        return upload((rows[0],), state.tokens.device)[0]
    return upload((rows.ravel(),), state.tokens.device)[0].view(rows.shape)
