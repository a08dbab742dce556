"""How a step of several positions per sequence begins on the device. Knows no network and no sampling.

The host sends a sheet, and the device finds the tokens, which it may have sampled itself since:

    sheet | slot of each sequence | its first position | its first row | its slot if it is sampled, or nobody's |

The column after the last has the number of rows as a first row, as padding has, whose slots are nobody's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quire.kernels.dispatch import op

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
