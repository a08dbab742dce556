"""How a step of several positions per sequence begins on the device. Knows no network and no sampling.

The host sends a sheet, and the device finds the tokens, which it may have sampled itself since:

    sheet | slot of each sequence | its first position | its first row | its slot if it is sampled, or nobody's |

The column after the last has the number of rows as a first row, as padding has, whose slots are nobody's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from quire.attention.base import Ragged
from quire.kernels.dispatch import op
from quire.runner.staging import send
from quire.runner.state import SlotState
from quire.scheduler.plan import Work

SHEET_ROWS = 4


class Layout(NamedTuple):
    """The tensors of T positions of S sequences, as in `Ragged`, in memory that stays where it is."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slot_mapping: Tensor  # [T] int64
    query_starts: Tensor  # [S + 1] int32, the first one always 0
    lengths: Tensor  # [S] int32
    following: Tensor  # [S] int64: where what is sampled goes
    last_rows: Tensor  # [S] int64: the row of each sequence's last position
    tables: Tensor  # [S, max_blocks] int32; of each sequence only the blocks that its length needs

    def first(self, num_tokens: int, num_seqs: int) -> "Layout":
        """The same memory for fewer positions and sequences."""
        tokens, seqs = (
            ("token_ids", "positions", "slot_mapping"),
            ("lengths", "following", "last_rows", "tables"),
        )
        parts = {name: getattr(self, name)[:num_tokens] for name in tokens}
        parts |= {name: getattr(self, name)[:num_seqs] for name in seqs}
        return self._replace(**parts, query_starts=self.query_starts[: num_seqs + 1])


@op
def lay_out(sheet: Tensor, numbers: Tensor, tokens: Tensor, layout: Layout, block_size: int) -> None:
    """Fill `layout` by `sheet` [4, S + 1] int64; the others as in `SlotState`."""
    slots, begins, starts = sheet[0, :-1], sheet[1, :-1], sheet[2]
    counts = starts.diff()
    lengths = torch.where(counts > 0, begins + counts, 0)
    rows = torch.arange(len(layout.token_ids), device=sheet.device)
    present = rows < starts[-1]
    owner = torch.searchsorted(starts[1:].contiguous(), rows, right=True).clamp(max=len(slots) - 1)
    positions = torch.where(present, begins[owner] + rows - starts[owner], 0)
    slot = slots[owner]
    places = numbers[slot, 1 + positions // block_size].long() * block_size + positions % block_size
    layout.token_ids.copy_(torch.where(present, tokens[slot, positions], 0))
    layout.positions.copy_(positions)
    layout.slot_mapping.copy_(torch.where(present, places, -1))
    layout.query_starts.copy_(starts)
    layout.lengths.copy_(lengths)
    layout.following.copy_(lengths)
    layout.last_rows.copy_((starts[1:] - 1).clamp(min=0))
    layout.tables.copy_(numbers[slots, 1:])


@lay_out.on("cuda", torch.int64)
def lay_out_triton(sheet: Tensor, numbers: Tensor, tokens: Tensor, layout: Layout, block_size: int) -> None:
    """One kernel."""
    from quire.runner.triton.layout import lay_out

    lay_out(sheet, numbers, tokens, layout, block_size)


class Sheet:
    """A sheet and what the device makes of it, in memory that stays where it is.

    Attributes:
        rows: the sheet [4, more than there are slots] int64.
        layout: of most positions of most sequences.
    """

    def __init__(self, state: SlotState, most_tokens: int):
        """For steps of up to so many positions, and as many sequences as there are slots."""
        most, device = state.nobody, state.tokens.device

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.state = state
        # Of even length, for rows that are aligned as other tensors are.
        self.rows = zeros(SHEET_ROWS, most // 2 * 2 + 2)
        self.layout = Layout(
            token_ids=zeros(most_tokens),
            positions=zeros(most_tokens),
            slot_mapping=zeros(most_tokens),
            query_starts=zeros(most + 1, dtype=torch.int32),
            lengths=zeros(most, dtype=torch.int32),
            following=zeros(most),
            last_rows=zeros(most),
            tables=zeros(most, state.tables.shape[1], dtype=torch.int32),
        )
        self.steps: dict[tuple[int, int, bool], tuple[Layout, Ragged]] = {}

    def send(self, sampling: Sequence[Work], others: Sequence[Work]) -> None:
        """Tell the device what to compute. What samples comes first, as in the step's report."""
        work, nobody = [*sampling, *others], self.state.nobody
        sheet = np.zeros(self.rows.shape, np.int64)
        sheet[0], sheet[3] = nobody, nobody
        sheet[0, : len(work)] = slots = [w.slot for w in work]
        sheet[1, : len(work)] = [w.start for w in work]
        ends = np.cumsum([w.count for w in work])
        sheet[2, 1:] = ends[-1]
        sheet[2, 1 : len(work) + 1] = ends
        sheet[3, : len(sampling)] = slots[: len(sampling)]
        send(sheet, self.rows)

    def lay_out(self, num_tokens: int, num_seqs: int) -> None:
        """What was sent, for a step of so many positions and sequences, padding included."""
        state, layout = self.state, self.layout.first(num_tokens, num_seqs)
        lay_out(self.rows[:, : num_seqs + 1], state.numbers, state.tokens, layout, state.block_size)

    def step(self, num_tokens: int, num_seqs: int, *, mixed: bool) -> tuple[Layout, Ragged]:
        """The same objects each time: attention backends know by them that it is the same memory."""
        of = num_tokens, num_seqs, mixed
        if of not in self.steps:
            layout = self.layout.first(num_tokens, num_seqs)
            ragged = Ragged(
                positions=layout.positions,
                slot_mapping=layout.slot_mapping,
                query_starts=layout.query_starts,
                lengths=layout.lengths,
                block_tables=layout.tables,
                rows=self.rows[0, :num_seqs],
                max_query=num_tokens,
                max_length=self.state.max_length,
                mixed=mixed,
                beside=self.state.beside,
                wanted=layout.last_rows,
            )
            self.steps[of] = layout, ragged
        return self.steps[of]
