"""A network whose steps of newest tokens are recorded on a CPU, one for each number of rows, and replayed.

What is replayed computes the same bits: it is the same kernels on the same numbers, without Python between them. A
network of which torch computes a part is left as it is (kernels/cpu/calls.py).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quire.attention.base import LayerCache, Ragged
from quire.kernels.cpu.calls import Memory, Step, record
from quire.layers.decoder import Decoder
from quire.log import logger

MOST_ROWS = 64  # with more, a step takes a hundred times as long as Python's part of it


class Inputs(NamedTuple):
    """A step's memory, which stays where it is."""

    token_ids: Tensor
    step: Ragged

    def fill(self, token_ids: Tensor, step: Ragged) -> None:
        mine, width = self.step, step.block_tables.shape[1]
        self.token_ids.copy_(token_ids)
        mine.positions.copy_(step.positions)
        mine.slot_mapping.copy_(step.slot_mapping)
        mine.lengths.copy_(step.lengths)
        mine.block_tables[:, :width].copy_(step.block_tables)


class RecordedNetwork:
    """Takes the place of a network with its caches."""

    def __init__(self, model: Decoder, caches: Sequence[LayerCache], max_blocks: int):
        """`max_blocks`: of the longest sequence."""
        self.model, self.caches = model, caches
        self.memory = Memory()
        self.steps: dict[
            tuple[int, int], tuple[Step, Inputs, Tensor]
        ] = {}  # by number of rows, and of threads
        self.refused: str | None = None  # what torch computes in this network, if anything
        self.numbers = torch.zeros(3, MOST_ROWS, dtype=torch.int64)  # token ids, positions, slots
        self.lengths = torch.zeros(MOST_ROWS, dtype=torch.int32)
        self.tables = torch.zeros(MOST_ROWS, max_blocks, dtype=torch.int32)

    def __call__(self, token_ids: Tensor, step: Ragged) -> Tensor:
        """As `Decoder.forward`."""
        count = len(token_ids)
        if self.refused is not None or step.max_query != 1 or not 0 < count <= MOST_ROWS:
            plain: Tensor = self.model(token_ids, step, self.caches)
            return plain
        kind = (count, torch.get_num_threads())
        if kind in self.steps:
            replayed, inputs, result = self.steps[kind]
            inputs.fill(token_ids, step)
            replayed.replay()
            return result.clone()
        inputs = self._inputs(count, step.max_length)
        inputs.fill(token_ids, step)
        with record(self.memory) as recorded:
            hidden: Tensor = self.model(inputs.token_ids, inputs.step, self.caches)
        if recorded.refused is None:
            self.steps[kind] = (recorded, inputs, hidden)
        else:
            logger.debug("steps are not recorded, as torch computes %s in them", recorded.refused)
            self.refused = recorded.refused
        return hidden.clone()

    def _inputs(self, count: int, max_length: int) -> Inputs:
        token_ids, positions, slots = self.numbers[:, :count]
        step = Ragged(
            positions=positions,
            slot_mapping=slots,
            query_starts=torch.arange(count + 1, dtype=torch.int32),
            lengths=self.lengths[:count],
            block_tables=self.tables[:count],
            max_query=1,
            max_length=max_length,
        )
        return Inputs(token_ids, step)
