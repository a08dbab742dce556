"""What a device remembers about each sequence between steps, by slot. Knows no scheduler and no network."""

from array import array

import numpy as np
import torch
from torch import Tensor

from quire.runner.staging import send, upload
from quire.scheduler.plan import Plan, Work
from quire.scheduler.spans import Spans, within
from quire.types import Coordinates


class SlotState:
    """Tokens, their number and block tables by slot; a plan brings only what changed.

        numbers: | number of tokens | block of positions 0 .. | block of the next positions | .. |

    A slot whose sequence a token has ended, as the host has yet to learn, has a negative number of tokens.

    One row more than there are slots: the last one is `nobody`'s, which a batch that is padded takes its padding from.

    Attributes:
        tokens: [num_slots + 1, max_length + 1] int32, prompt and outputs; the device writes what it samples. The last
            column takes a token that fills the context and is never read.
        numbers: [num_slots + 1, 1 + max_blocks] int32, in one tensor so that one write changes all that a step changes.
        tables: its columns of KV blocks, in the order of the positions they hold.
        blocks: the same of each slot, on the host.
        beside: [parts, num_blocks] int32, the blocks beside each block of the pool, where layers have any.
        coordinates: of slots whose tokens are not one after another, on the host.
        spans: of each slot, positions that see each other.
        num_starts: sequences that have been given a slot so far.
    """

    def __init__(
        self,
        num_slots: int,
        max_length: int,
        block_size: int,
        device: torch.device,
        beside: Tensor | None = None,
    ):
        max_blocks = -(-max_length // block_size)
        self.nobody, self.max_length, self.block_size = num_slots, max_length, block_size
        self.tokens = torch.zeros(num_slots + 1, max_length + 1, dtype=torch.int32, device=device)
        self.numbers = torch.zeros(num_slots + 1, 1 + max_blocks, dtype=torch.int32, device=device)
        self.tables = self.numbers[:, 1:]
        self.blocks = [array("i") for _ in range(num_slots)]
        self.num_starts = 0
        self.prompt_len = [0] * num_slots
        self.coordinates: dict[int, Coordinates] = {}
        self.spans: list[Spans] = [()] * num_slots
        self.beside = beside

    def apply(self, plan: Plan) -> None:
        """Take over the plan's new sequences and new blocks."""
        if plan.beside and self.beside is not None:
            rows = np.array(plan.beside)
            told = upload((rows.ravel(),), self.beside.device)[0].view(rows.shape)
            self.beside[:, told[:, 0]] = told[:, 1:].T.int()
        for slot in plan.ends:
            self.coordinates.pop(slot, None)
        width = self.numbers.shape[1]
        places: list[int] = []  # in `numbers`, flat; none twice
        values: list[int] = []
        for start in plan.starts:
            num_tokens = len(start.tokens)
            send(np.array(start.tokens, dtype=np.int32), self.tokens[start.slot, :num_tokens])
            places.append(start.slot * width)
            values.append(num_tokens)
            self.blocks[start.slot] = array("i")
            self.num_starts += 1
            self.prompt_len[start.slot] = start.prompt_len
            if start.coordinates is not None:
                self.coordinates[start.slot] = start.coordinates
            self.spans[start.slot] = start.spans
        for work in plan.work:
            if work.new_blocks:
                mine = self.blocks[work.slot]
                first = work.slot * width + 1 + len(mine)
                mine.extend(work.new_blocks)
                places += range(first, first + len(work.new_blocks))
                values += work.new_blocks
        self._hear(plan)
        if places:
            at, what = upload((np.array(places), np.array(values)), self.numbers.device)
            self.numbers.view(-1)[at] = what.int()

    def sees_ahead(self, work: Work) -> bool:
        """Whether positions of it see later ones."""
        spans = self.spans[work.slot]
        return bool(spans) and any(within(spans, work.start, work.start + work.count))

    def _hear(self, plan: Plan) -> None:
        """Of newest tokens that another stage has sampled."""
        told = [(w.slot, w.start, w.token) for w in plan.work if w.token >= 0]
        if told:
            self.append(*upload(list(np.array(told).T), self.tokens.device))

    def append(self, slots: Tensor, positions: Tensor, tokens: Tensor) -> None:
        """Remember sampled tokens, so that the next step can start before the host has seen them."""
        self.tokens[slots, positions] = tokens.int()
        self.numbers[slots, 0] = (positions + 1).int()
