"""How a step whose rows are all newest tokens begins and ends on the device. Knows no network and no sampling.

It is all that such a step needs from the host's point of view: which slot each row is. A row whose slot is the last
one, nobody's, is padding: it owns no position, is written nowhere, and leaves nothing behind.

A slot whose newest token ends its sequence has ended: its number of tokens is negative, until another sequence takes
it. The host may have planned its next position before it knew. That row is computed in vain, as kernels know no row
without a position between others, and its token is dropped. At the length limit the host plans no further by itself.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quire.kernels.cpu.calls import kernel
from quire.kernels.cpu.native import load
from quire.kernels.dispatch import op
from quire.runner.ring import Ring
from quire.sampling.slots import Stops

ENDED = -1  # in place of a token in the report of a row that had ended


class Inputs(NamedTuple):
    """The tensors of a step of B rows, as in `Ragged`, in memory that stays where it is."""

    token_ids: Tensor  # [B] int64
    positions: Tensor  # [B] int64
    following: Tensor  # [B] int64: where what is sampled goes
    slot_mapping: Tensor  # [B] int64
    query_starts: Tensor  # [B + 1] int32, the first one always 0
    lengths: Tensor  # [B] int32
    tables: Tensor  # [B, max_blocks] int32; of each row only the blocks that its length needs

    def first(self, num_rows: int) -> "Inputs":
        """The same memory for fewer rows."""
        starts = self.query_starts[: num_rows + 1]
        return Inputs(*(x[:num_rows] for x in self))._replace(query_starts=starts)


@op
def gather(rows: Tensor, numbers: Tensor, tokens: Tensor, inputs: Inputs, block_size: int) -> None:
    """Fill `inputs` with the newest token of slots `rows` [B] int64; the others as in `SlotState`."""
    present = rows < len(numbers) - 1
    mine = numbers[rows]
    lengths = torch.where(present, mine[:, 0].abs(), 0)
    positions = (lengths - 1).clamp(min=0).long()
    blocks = mine[:, 1:].gather(1, (positions // block_size)[:, None])[:, 0].long()
    places = blocks * block_size + positions % block_size
    inputs.token_ids.copy_(tokens[rows, positions])
    inputs.positions.copy_(positions)
    inputs.following.copy_(positions + 1)
    inputs.slot_mapping.copy_(torch.where(present & (mine[:, 0] > 0), places, -1))
    inputs.query_starts[1:].copy_(present.cumsum(0))
    inputs.lengths.copy_(lengths)
    inputs.tables.copy_(mine[:, 1:])


@gather.on("cpu", torch.int64)
def gather_native(rows: Tensor, numbers: Tensor, tokens: Tensor, inputs: Inputs, block_size: int) -> None:
    """The compiled kernel, where there is one."""
    if load()[0] is None:
        gather.reference(rows, numbers, tokens, inputs, block_size)
        return
    kernel("quire_gather")(
        *(rows.data_ptr(), numbers.data_ptr(), tokens.data_ptr(), *(x.data_ptr() for x in inputs)),
        *(
            len(rows),
            len(numbers) - 1,
            numbers.stride(0),
            tokens.stride(0),
            inputs.tables.stride(0),
            block_size,
        ),
    )


@gather.on("cuda", torch.int64)
def gather_triton(rows: Tensor, numbers: Tensor, tokens: Tensor, inputs: Inputs, block_size: int) -> None:
    """One kernel."""
    from quire.runner.triton.advance import gather

    gather(rows, numbers, tokens, inputs, block_size)


@op
def advance(
    rows: Tensor,
    numbers: Tensor,
    tokens: Tensor,
    stops: Stops,
    following: Tensor,
    token_ids: Tensor,
    bad: Tensor,
    scores: Tensor | None,
    ring: Ring,
) -> None:
    """Append `token_ids` [B] to slots `rows` [B] at positions `following` [B], end those that `stops` end, and report.

    The report goes to the ring's next entry: token ids [B], or ENDED, `bad` [B] as 0 or 1, and `scores` [any] int32.
    Then its count is one more.
    """
    alive = (rows < len(numbers) - 1) & (numbers[rows, 0] > 0)
    ends = torch.zeros_like(alive)
    for row, (slot, token) in enumerate(zip(rows.tolist(), token_ids.tolist(), strict=True)):
        if (record := stops.records.of[slot]) is not None:
            ends[row] = (token == record[1:]).any() & (following[row] >= stops.start[slot])
    mine, at = rows[alive], following[alive]
    tokens[mine, at] = token_ids[alive].int()
    numbers[mine, 0] = torch.where(ends[alive], -at - 1, at + 1).int()
    reported = torch.where(alive | (rows == len(numbers) - 1), token_ids, ENDED)
    parts = [reported.int(), bad.int()] + ([] if scores is None else [scores])
    report = torch.cat(parts).to(ring.entries.device)
    ring.entries[int(ring.count) % len(ring.entries), : len(report)] = report
    ring.count += 1


@advance.on("cpu", torch.int64)
def advance_native(
    rows: Tensor,
    numbers: Tensor,
    tokens: Tensor,
    stops: Stops,
    following: Tensor,
    token_ids: Tensor,
    bad: Tensor,
    scores: Tensor | None,
    ring: Ring,
) -> None:
    """The compiled kernel, where there is one."""
    if load()[0] is None:
        advance.reference(rows, numbers, tokens, stops, following, token_ids, bad, scores, ring)
        return
    kernel("quire_advance")(
        *(rows.data_ptr(), numbers.data_ptr(), tokens.data_ptr()),
        *(stops.records.addresses.data_ptr(), stops.start.data_ptr()),
        *(following.data_ptr(), token_ids.data_ptr(), bad.data_ptr()),
        *(0 if scores is None else scores.data_ptr(), ring.entries.data_ptr(), ring.count.data_ptr()),
        *(len(rows), len(numbers) - 1, numbers.stride(0), tokens.stride(0)),
        *(0 if scores is None else scores.numel(), *ring.entries.shape),
    )


@advance.on("cuda", torch.int64)
def advance_triton(
    rows: Tensor,
    numbers: Tensor,
    tokens: Tensor,
    stops: Stops,
    following: Tensor,
    token_ids: Tensor,
    bad: Tensor,
    scores: Tensor | None,
    ring: Ring,
) -> None:
    """One kernel."""
    from quire.runner.triton.advance import advance

    advance(rows, numbers, tokens, stops, following, token_ids, bad, scores, ring)
