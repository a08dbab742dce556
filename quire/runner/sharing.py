"""Which sequences begin with the same blocks, so that attention can read these once for all. Knows no device."""

from array import array
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEAST_MEMBERS = 4
LEAST_SAVED = (
    16_384  # keys that a layer need not read again; fewer take as long as dividing the work (estimated)
)


class Group(NamedTuple):
    """Rows that begin with the same blocks."""

    rows: list[int]
    num_blocks: int

    @property
    def num_saved(self) -> int:
        """Blocks that need not be read again."""
        return (len(self.rows) - 1) * self.num_blocks


def find_groups(tables: Sequence["array[int]"], num_complete: Sequence[int], block_size: int) -> list[Group]:
    """Disjoint groups that save most, or none if that is not worth it.

    `tables` are the block ids of each row, of which the first `num_complete` never change.
    """
    by_first: defaultdict[int, list[int]] = defaultdict(list)
    for row, (table, count) in enumerate(zip(tables, num_complete, strict=True)):
        if count:
            by_first[table[0]].append(row)
    groups: list[Group] = []
    for rows in by_first.values():
        if len(rows) >= LEAST_MEMBERS:
            # Any order will do in which equal beginnings are neighbours.
            keyed = sorted((tables[row][: num_complete[row]].tobytes(), row) for row in rows)
            keys = [np.frombuffer(key, dtype=np.int32) for key, _ in keyed]
            equal = [_num_equal(a, b) for a, b in zip(keys, keys[1:], strict=False)]
            groups += _best([row for _, row in keyed], equal)
    return groups if sum(group.num_saved for group in groups) * block_size >= LEAST_SAVED else []


def _num_equal(a: np.ndarray, b: np.ndarray) -> int:
    count = min(len(a), len(b))
    differ = a[:count] != b[:count]
    return int(differ.argmax()) if differ.any() else count


def _best(rows: list[int], equal: list[int]) -> list[Group]:
    """All `rows` as one group, or as smaller ones that have more in common; `equal` blocks of each with the next."""
    if len(rows) < LEAST_MEMBERS:
        return []
    whole = Group(rows, min(equal))
    parts: list[Group] = []
    begin = 0
    for end in [i + 1 for i, count in enumerate(equal) if count == whole.num_blocks] + [len(rows)]:
        parts += _best(rows[begin:end], equal[begin : end - 1])
        begin = end
    return [whole] if whole.num_saved >= sum(part.num_saved for part in parts) else parts
