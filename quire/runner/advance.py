"""How a step whose rows are all newest tokens begins and ends on the device. Knows no network and no sampling.

It is all that such a step needs from the host's point of view: which slot each row is. A row whose slot is the last
one, nobody's, is padding: it owns no position, is written nowhere, and leaves nothing behind.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quire.kernels.dispatch import op


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
    lengths = torch.where(present, mine[:, 0], 0)
    positions = (lengths - 1).clamp(min=0).long()
    blocks = mine[:, 1:].gather(1, (positions // block_size)[:, None])[:, 0].long()
    places = blocks * block_size + positions % block_size
    inputs.token_ids.copy_(tokens[rows, positions])
    inputs.positions.copy_(positions)
    inputs.following.copy_(positions + 1)
    inputs.slot_mapping.copy_(torch.where(present, places, -1))
    inputs.query_starts[1:].copy_(present.cumsum(0))
    inputs.lengths.copy_(lengths)
    inputs.tables.copy_(mine[:, 1:])


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
    following: Tensor,
    token_ids: Tensor,
    bad: Tensor,
    scores: Tensor | None,
    entries: Tensor,
    count: Tensor,
) -> None:
    """Append `token_ids` [B] to slots `rows` [B] at positions `following` [B], and report them.

    The report goes to row `count % E` of `entries` [E, W] int32, which is memory of the host: token ids [B], `bad` [B]
    as 0 or 1, and `scores` [any] int32. Then `count` [1] int64 is one more.
    """
    present = rows < len(numbers) - 1
    mine, at = rows[present], following[present]
    tokens[mine, at] = token_ids[present].int()
    numbers[mine, 0] = (at + 1).int()
    parts = [token_ids.int(), bad.int()] + ([] if scores is None else [scores])
    report = torch.cat(parts).to(entries.device)
    entries[int(count) % len(entries), : len(report)] = report
    count += 1


@advance.on("cuda", torch.int64)
def advance_triton(
    rows: Tensor,
    numbers: Tensor,
    tokens: Tensor,
    following: Tensor,
    token_ids: Tensor,
    bad: Tensor,
    scores: Tensor | None,
    entries: Tensor,
    count: Tensor,
) -> None:
    """One kernel."""
    from quire.runner.triton.advance import advance

    advance(rows, numbers, tokens, following, token_ids, bad, scores, entries, count)
