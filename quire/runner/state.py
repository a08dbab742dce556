"""What a device remembers about each sequence between steps, by slot. Knows no scheduler and no network."""

import numpy as np
import torch
from torch import Tensor

from quire.scheduler.plan import Plan


class SlotState:
    """Tokens and block tables by slot; a plan brings only what changed.

    Attributes:
        tokens: [num_slots, max_length + 1] int32, prompt and outputs; the device writes what it samples. The last
            column takes a token that fills the context and is never read.
        tables: [num_slots, max_blocks] int32, KV blocks in the order of the positions they hold.
    """

    def __init__(self, num_slots: int, max_length: int, block_size: int, device: torch.device):
        max_blocks = -(-max_length // block_size)
        self.tokens = torch.zeros(num_slots, max_length + 1, dtype=torch.int32, device=device)
        self.tables = torch.zeros(num_slots, max_blocks, dtype=torch.int32, device=device)
        self.num_blocks = [0] * num_slots
        self.prompt_len = [0] * num_slots

    def apply(self, plan: Plan) -> None:
        """Take over the plan's new sequences and new blocks."""
        for start in plan.starts:
            self.tokens[start.slot, : len(start.tokens)] = torch.from_numpy(
                np.array(start.tokens, dtype=np.int32)
            )
            self.num_blocks[start.slot] = 0
            self.prompt_len[start.slot] = start.prompt_len
        slots: list[int] = []
        columns: list[int] = []
        blocks: list[int] = []
        for work in plan.work:
            if work.new_blocks:
                first = self.num_blocks[work.slot]
                self.num_blocks[work.slot] = last = first + len(work.new_blocks)
                slots += [work.slot] * len(work.new_blocks)
                columns += range(first, last)
                blocks += work.new_blocks
        if blocks:
            put = torch.tensor((slots, columns, blocks), device=self.tables.device)
            self.tables[put[0], put[1]] = put[2].int()

    def append(self, slots: Tensor, positions: Tensor, tokens: Tensor) -> None:
        """Remember sampled tokens, so that the next step can start before the host has seen them."""
        self.tokens[slots, positions] = tokens.int()
