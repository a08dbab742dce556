"""A step as near layers see it: the compiled kernel finds what the reference finds, and both find the right places."""

import random

import pytest
import torch

from quire.attention.base import ragged
from quire.attention.views import elsewhere, seen_from
from quire.kernels.cpu.native import load
from quire.parallel.axis import Axis

NUM_BLOCKS, SIZE = 40, 4


@pytest.mark.parametrize("chunk", [0, 8, 12])
@pytest.mark.parametrize("beside", [False, True])
def test_the_kernel_equals_the_reference(beside: bool, chunk: int) -> None:
    if load()[0] is None:
        pytest.skip("no library")
    rng = random.Random(chunk)
    blocks = torch.tensor(rng.sample(range(NUM_BLOCKS), NUM_BLOCKS), dtype=torch.int32) if beside else None
    starts, counts = [0, 5, 16, 31], [7, 1, 4, 1]
    free = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    tables = [[free.pop() for _ in range(-(-(s + c) // SIZE))] for s, c in zip(starts, counts, strict=True)]
    step = ragged(starts, counts, tables, SIZE)
    slots = torch.cat((step.slot_mapping, torch.tensor([-1, -1])))
    args = step.block_tables, slots, step.lengths, blocks, SIZE, chunk
    ours, theirs = elsewhere(*args), elsewhere.reference(*args)
    assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[2], theirs[2])
    for row, length in enumerate(ours[2].tolist()):
        used = -(-length // SIZE)
        assert torch.equal(ours[0][row, :used], theirs[0][row, :used])


def test_layers_find_their_blocks_and_their_chunk() -> None:
    step = ragged([9], [2], [[3, 1, 2]], SIZE)
    beside = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]], dtype=torch.int32)
    object.__setattr__(step, "beside", beside)
    seen = seen_from(step, [(1, None), (2, None), (0, 8), (2, 8)], SIZE, Axis()).views
    assert seen[1, None].block_tables.tolist() == [[13, 11, 12]]
    assert seen[2, None].slot_mapping.tolist() == [22 * SIZE + 1, 22 * SIZE + 2]
    assert seen[2, None].lengths is step.lengths and seen[2, None].positions is step.positions
    for place, block in (((0, 8), 2), ((2, 8), 22)):
        assert seen[place].block_tables[0, 0] == block and seen[place].lengths.tolist() == [3]
        assert seen[place].max_length == 8 and seen[place].positions.tolist() == [9, 10]


def test_a_step_that_does_not_know_what_is_beside_is_refused() -> None:
    with pytest.raises(ValueError, match="does not say"):
        seen_from(ragged([0], [1], [[0]], SIZE), [(1, None)], SIZE, Axis())
