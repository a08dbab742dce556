"""Sequences that begin with the same blocks are found, and steps tell attention the truth about them."""

import random
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.attention.base import LayerCache, Ragged
from quire.attention.reference import Reference
from quire.runner import rows as placing
from quire.runner import sharing
from quire.runner.rows import GROUP_SIZE
from quire.runner.sharing import LEAST_SAVED, Group, find_groups
from quire.types import OutputKind, SamplingParams
from tests.models.cases import BY_NAME, build_hf
from tests.runner.test_fixed import BLOCK_SIZE, fix, make_engine, run

BIG = LEAST_SAVED  # blocks of so many positions are always worth it


def tables(*rows: list[int]) -> list["array[int]"]:
    return [array("i", row) for row in rows]


def test_groups() -> None:
    five = tables(*([1, 2, 3, 100 + i] for i in range(5)))
    assert find_groups(five, [3] * 5, BIG) == [Group([0, 1, 2, 3, 4], 3)]
    assert find_groups(five, [2] * 5, BIG) == [Group([0, 1, 2, 3, 4], 2)]  # what is not complete may change
    assert find_groups(five, [3, 2, 3, 3, 3], BIG) == [
        Group([0, 2, 3, 4], 3)
    ]  # saves 9 blocks, and all of them 8
    assert find_groups(five, [0] * 5, BIG) == find_groups([], [], BIG) == []
    assert find_groups(five[:3], [3] * 3, BIG) == []  # too few
    assert find_groups(five, [4] * 5, LEAST_SAVED // 12 - 1) == []  # too little: 4 times 3 blocks
    assert find_groups(five, [4] * 5, LEAST_SAVED // 12 + 1) != []


def test_smaller_groups_where_they_have_more_in_common() -> None:
    """All begin with the same block, and each half with many more."""
    left = tables(*([1, *range(10, 40), 100 + i] for i in range(4)))
    right = tables(*([1, *range(50, 90), 200 + i] for i in range(5)))
    rows = [row for pair in zip(left, right[:4], strict=True) for row in pair] + right[4:]
    found = find_groups(rows, [100] * 9, BIG)
    assert sorted((sorted(group.rows), group.num_blocks) for group in found) == [
        ([0, 2, 4, 6], 31),
        ([1, 3, 5, 7, 8], 41),
    ]
    assert find_groups([*rows, *tables([7, 8])], [100] * 10, BIG) == found
    flat = find_groups(tables(*([1, 2 + i // 4, 100 + i] for i in range(40))), [3] * 40, BIG)
    assert [(len(group.rows), group.num_blocks) for group in flat] == [(4, 2)] * 10  # 60 saved, not 39


def test_any_tables_give_disjoint_groups_that_tell_the_truth() -> None:
    chance = random.Random(5)
    for _ in range(200):
        rows = []
        for _ in range(chance.randrange(1, 30)):
            start = list(rows[chance.randrange(len(rows))][: chance.randrange(1, 9)]) if rows else []
            rows.append(
                array("i", [*start, *(chance.randrange(1, 4) for _ in range(chance.randrange(1, 5)))])
            )
        complete = [chance.randrange(len(row) + 1) for row in rows]
        found = find_groups(rows, complete, BIG)
        members = [row for group in found for row in group.rows]
        assert len(set(members)) == len(members)
        for group in found:
            starts = {rows[row][: group.num_blocks].tobytes() for row in group.rows}
            assert len(starts) == 1 and group.num_blocks <= min(complete[row] for row in group.rows)
            assert group.num_blocks > 0


class Checking(Reference):
    """Attention that believes nothing about shared pages."""

    shares = True

    def __init__(self, block_size: int):
        super().__init__(block_size)
        self.sizes: list[int] = []

    def attend(self, q: Tensor, cache: LayerCache, step: Ragged, **how: Any) -> Tensor:
        if step.shared is not None:
            own = torch.zeros_like(step.shared.num_pages)
            for rows, count in zip(step.shared.members, step.shared.member_pages.tolist(), strict=True):
                rows = rows[rows >= 0].long()
                own[rows] = count
                if count:
                    assert len({tuple(table[:count].tolist()) for table in step.block_tables[rows]}) == 1
                    assert (count * self.block_size < step.lengths[rows]).all()
                    self.sizes.append(len(rows))
            assert torch.equal(own, step.shared.num_pages)
        return super().attend(q, cache, step, **how)


@pytest.mark.parametrize("overlap", [False, True])
def test_steps_say_what_sequences_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    build_hf(BY_NAME["Qwen3"], tmp_path)
    for module in (sharing, placing):
        monkeypatch.setattr(module, "LEAST_MEMBERS", 2)
    monkeypatch.setattr(sharing, "LEAST_SAVED", 1)
    chance = random.Random(3)
    beginnings = [[3 + i] * (2 * BLOCK_SIZE + i) for i in range(3)]
    work = []
    for i in range(24 + GROUP_SIZE):
        prompt = [*beginnings[i % 3 if i < 24 else 0], *(chance.randrange(3, 90) for _ in range(3))]
        params = SamplingParams(
            temperature=0,
            max_tokens=chance.randrange(2, 12),
            ignore_eos=True,
            output_kind=OutputKind.FINAL_ONLY,
        )
        work.append((prompt, params, 0 if not i else 4 + i // 4))
    options = {"async_scheduling": overlap, "max_num_seqs": 30, "max_num_batched_tokens": 512}
    engine, backend = make_engine(str(tmp_path), **options), Checking(BLOCK_SIZE)
    model = engine.core.runner.model
    object.__setattr__(model.build, "backend", backend)  # which all layers have
    fixed = fix(engine)
    assert run(engine, work) == run(make_engine(str(tmp_path), **options), work)
    assert {kind.shares for kind in fixed.graphs.ready} == {True, False}
    assert max(backend.sizes) > 4 and len(set(backend.sizes)) > 3
