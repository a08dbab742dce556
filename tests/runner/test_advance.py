"""The kernels that begin and end steps of newest tokens do what their references do, also for padding."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quire.runner.advance import ENDED, Inputs, advance, gather  # noqa: E402
from quire.runner.ring import NUM_ENTRIES, Ring  # noqa: E402
from quire.runner.triton import advance as kernels  # noqa: E402
from quire.sampling.records import Records  # noqa: E402
from quire.sampling.slots import Stops  # noqa: E402
from tests.interpreter import INTERPRETED  # noqa: E402  (it imports Triton)

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
BLOCK_SIZE, MAX_LENGTH, NUM_SLOTS = 4, 2200, 9  # more blocks than a kernel copies at once
MAX_BLOCKS = MAX_LENGTH // BLOCK_SIZE


@dataclass
class Memory:
    """What a step reads and writes."""

    numbers: Tensor
    tokens: Tensor
    inputs: Inputs
    ring: Ring
    stops: Stops


def make_memory(num_rows: int) -> Memory:
    chance = random.Random(num_rows)
    numbers = torch.zeros(NUM_SLOTS + 1, 1 + MAX_BLOCKS, dtype=torch.int32)
    for slot in range(NUM_SLOTS):
        length = chance.choice([1, 2, 4, 5, 100, MAX_LENGTH])
        used = -(-length // BLOCK_SIZE)
        numbers[slot, 0] = length
        numbers[slot, 1 : 1 + used] = torch.tensor(chance.sample(range(1, 5000), used))
    numbers[NUM_SLOTS, 1] = 4711  # nobody's, and never to be used
    tokens = torch.randint(1, 100, (NUM_SLOTS + 1, MAX_LENGTH + 1), dtype=torch.int32)

    def junk(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.full(shape, 77, dtype=dtype, device=DEVICE)

    inputs = Inputs(
        token_ids=junk(num_rows),
        positions=junk(num_rows),
        following=junk(num_rows),
        slot_mapping=junk(num_rows),
        query_starts=torch.zeros(num_rows + 1, dtype=torch.int32, device=DEVICE),
        lengths=junk(num_rows, dtype=torch.int32),
        tables=junk(num_rows, MAX_BLOCKS, dtype=torch.int32),
    )
    none = torch.zeros(2, NUM_SLOTS + 1, dtype=torch.int64, device=DEVICE)
    stops = Stops(Records(none[0].cpu(), none[0]), none[1])
    return Memory(numbers.to(DEVICE), tokens.to(DEVICE), inputs, Ring(200, DEVICE), stops)


def copy(memory: Memory) -> Memory:
    ring = Ring(200, DEVICE)
    return Memory(
        memory.numbers.clone(),
        memory.tokens.clone(),
        Inputs(*(x.clone() for x in memory.inputs)),
        ring,
        memory.stops,
    )


@pytest.mark.parametrize(("num_present", "num_rows"), [(1, 1), (3, 4), (5, 16), (9, 16), (0, 2)])
def test_kernels_equal_references(num_present: int, num_rows: int) -> None:
    torch.manual_seed(num_rows)
    want = make_memory(num_rows)
    got = copy(want)
    slots = random.Random(1).sample(range(NUM_SLOTS), num_present)
    rows = torch.tensor(slots + [NUM_SLOTS] * (num_rows - num_present), device=DEVICE)
    for step in range(NUM_ENTRIES + 2):
        gather.reference(rows, want.numbers, want.tokens, want.inputs, BLOCK_SIZE)
        kernels.gather(rows, got.numbers, got.tokens, got.inputs, BLOCK_SIZE)
        check_inputs(got, want, num_present)
        ids = torch.randint(0, 100, (num_rows,), device=DEVICE)
        bad = torch.rand(num_rows, device=DEVICE) < 0.3
        scores = torch.randint(0, 1 << 30, (150,), dtype=torch.int32, device=DEVICE) if step % 2 else None
        advance.reference(*step_of(want, rows), ids, bad, scores, want.ring)
        kernels.advance(*step_of(got, rows), ids, bad, scores, got.ring)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        assert got.ring.count.item() == want.ring.count.item() == step + 1
        assert torch.equal(got.ring.entries, want.ring.entries)
        report = got.ring.entries[step % NUM_ENTRIES]
        assert report[:num_rows].tolist() == ids.tolist()
        assert report[num_rows : 2 * num_rows].tolist() == bad.int().tolist()
        assert torch.equal(got.numbers, want.numbers)
        assert torch.equal(got.tokens[:NUM_SLOTS], want.tokens[:NUM_SLOTS])
        got.numbers[:NUM_SLOTS, 0].clamp_(max=MAX_LENGTH)
        want.numbers[:NUM_SLOTS, 0].clamp_(max=MAX_LENGTH)


def step_of(memory: Memory, rows: Tensor) -> tuple[Any, ...]:
    return rows, memory.numbers, memory.tokens, memory.stops, memory.inputs.following


def test_a_stop_token_ends_its_slot() -> None:
    """From its first position on; then nothing is appended, until the slot is another sequence's."""
    ends = {0: ([7], 0), 1: ([8, 9, 7], 0), 2: ([7], 12), 3: ([8, 9], 10), 5: (list(range(8, 90)), 5)}
    want = make_memory(8)
    host = torch.zeros(NUM_SLOTS + 1, dtype=torch.int64)
    want.stops = Stops(Records(host, host.to(DEVICE)), torch.zeros_like(host, device=DEVICE))
    for slot, (ids, start) in ends.items():
        want.stops.records.put(slot, np.array([len(ids), *ids], np.int32))
        want.stops.start[slot] = start
    want.stops.records.addresses.copy_(host)
    want.numbers[:NUM_SLOTS, 0] = 10
    want.numbers[6, 0] = -10  # it has ended before
    got = copy(want)
    rows = torch.tensor([6, 0, 1, 2, 3, 4, 5, NUM_SLOTS], device=DEVICE)
    turns = [  # tokens sampled, numbers of tokens afterwards, and what is reported
        ([7, 7, 7, 7, 7, 7, 89, 7], [-10, -11, -11, 11, 11, 11, -11, 0], [ENDED, 7, 7, 7, 7, 7, 89, 7]),
        ([6] * 8, [-10, -11, -11, 12, 12, 12, -11, 0], [ENDED, ENDED, ENDED, 6, 6, 6, ENDED, 6]),
        (
            [7, 1, 1, 7, 9, 7, 8, 0],
            [-10, -11, -11, -13, -13, 13, -11, 0],
            [ENDED, ENDED, ENDED, 7, 9, 7, ENDED, 0],
        ),
    ]
    bad = torch.zeros(8, dtype=torch.bool, device=DEVICE)
    for turn, (ids, numbers, reported) in enumerate(turns):
        token_ids = torch.tensor(ids, device=DEVICE)
        gather.reference(rows, want.numbers, want.tokens, want.inputs, BLOCK_SIZE)
        kernels.gather(rows, got.numbers, got.tokens, got.inputs, BLOCK_SIZE)
        check_inputs(got, want, 7)
        advance.reference(*step_of(want, rows), token_ids, bad, None, want.ring)
        kernels.advance(*step_of(got, rows), token_ids, bad, None, got.ring)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        for memory in (want, got):
            assert memory.numbers[rows, 0].tolist() == numbers
            assert memory.ring.entries[turn, :8].tolist() == reported
        assert torch.equal(got.tokens[:NUM_SLOTS], want.tokens[:NUM_SLOTS])
        ended = [row for row, token in enumerate(reported) if token == ENDED]
        assert got.inputs.slot_mapping[ended].eq(-1).all() and got.inputs.lengths[ended].ge(10).all()


def check_inputs(got: Memory, want: Memory, num_present: int) -> None:
    for name in ("token_ids", "positions", "following", "slot_mapping", "query_starts", "lengths"):
        ours, theirs = (m.inputs._asdict()[name] for m in (got, want))
        if name == "token_ids":  # padding's may be anything that is a token
            ours, theirs = ours[:num_present], theirs[:num_present]
        assert torch.equal(ours, theirs), name
    assert got.inputs.slot_mapping[num_present:].eq(-1).all() and got.inputs.lengths[num_present:].eq(0).all()
    assert got.inputs.query_starts[-1] == num_present
    for row, length in enumerate(got.inputs.lengths.tolist()):
        used = -(-length // BLOCK_SIZE)
        assert torch.equal(got.inputs.tables[row, :used], want.inputs.tables[row, :used])
