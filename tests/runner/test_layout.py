"""The kernel that begins mixed steps does what its reference does, also for padding."""

import random

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quire.runner.layout import SHEET_ROWS, Layout, lay_out  # noqa: E402
from quire.runner.triton import layout as kernels  # noqa: E402
from tests.interpreter import INTERPRETED  # noqa: E402  (it imports Triton)

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
BLOCK_SIZE, MAX_BLOCKS, NUM_SLOTS = 4, 300, 150  # more blocks than a kernel copies at once


def junk(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.full(shape, 77, dtype=dtype, device=DEVICE)


def make_layout(num_tokens: int, num_seqs: int) -> Layout:
    return Layout(
        token_ids=junk(num_tokens),
        positions=junk(num_tokens),
        slot_mapping=junk(num_tokens),
        query_starts=torch.zeros(num_seqs + 1, dtype=torch.int32, device=DEVICE),
        lengths=junk(num_seqs, dtype=torch.int32),
        following=junk(num_seqs),
        last_rows=junk(num_seqs),
        tables=junk(num_seqs, MAX_BLOCKS, dtype=torch.int32),
    )


@pytest.mark.parametrize(
    ("chunks", "num_tokens", "num_seqs"),
    [
        ([(0, 1)], 32, 1),
        ([(9, 1), (0, 30), (1100, 70), (3, 1)], 192, 8),
        ([(i, 1 + i % 2) for i in range(140)], 224, 150),
        ([(0, 64), (64, 64)], 128, 2),
    ],
)
def test_the_kernel_equals_its_reference(
    chunks: list[tuple[int, int]], num_tokens: int, num_seqs: int
) -> None:
    chance, count = random.Random(num_tokens), len(chunks)
    numbers = torch.randint(1, 5000, (NUM_SLOTS + 1, 1 + MAX_BLOCKS), dtype=torch.int32, device=DEVICE)
    tokens = torch.randint(1, 100, (NUM_SLOTS + 1, BLOCK_SIZE * MAX_BLOCKS + 1), dtype=torch.int32).to(DEVICE)
    slots = chance.sample(range(NUM_SLOTS), count)
    sheet = torch.zeros(SHEET_ROWS, num_seqs + 3, dtype=torch.int64)
    sheet[0], sheet[3] = NUM_SLOTS, NUM_SLOTS
    sheet[0, :count] = torch.tensor(slots)
    sheet[1, :count] = torch.tensor([start for start, _ in chunks])
    ends = torch.tensor([size for _, size in chunks]).cumsum(0)
    sheet[2, 1 : count + 1], sheet[2, count + 1 :] = ends, ends[-1]
    sheet = sheet.to(DEVICE)[:, : num_seqs + 1]
    got, want = make_layout(num_tokens, num_seqs), make_layout(num_tokens, num_seqs)
    lay_out.reference(sheet, numbers, tokens, want, BLOCK_SIZE)
    kernels.lay_out(sheet, numbers, tokens, got, BLOCK_SIZE)
    for name in set(Layout._fields) - {"tables"}:
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    for seq, length in enumerate(want.lengths.tolist()):
        used = -(-length // BLOCK_SIZE)
        assert torch.equal(got.tables[seq, :used], want.tables[seq, :used])
    row = 0
    for slot, (start, size) in zip(slots, chunks, strict=True):
        assert want.token_ids[row : row + size].tolist() == tokens[slot, start : start + size].tolist()
        assert want.positions[row : row + size].tolist() == list(range(start, start + size))
        row += size
    assert want.slot_mapping[row:].eq(-1).all()
    assert want.following[:count].tolist() == [sum(chunk) for chunk in chunks]
