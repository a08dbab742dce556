"""How many prompt tokens the cache had, and why it lacked the others. Knows no sequences.

Why is told for each block from the first that was not found: it had been there and had to make room, or nobody is known
to have computed it. What a full block cannot hold is never found, nor is a prompt's last token, which is always
computed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from quire.scheduler.blocks import BlockPool


@dataclass(slots=True)
class Lookups:
    """Totals in tokens; all but `queries` and `hits` are reasons for misses."""

    queries: int = 0
    hits: int = 0
    new: int = 0
    evicted: int = 0
    tail: int = 0
    unread: int = 0

    def count(self, pool: BlockPool, num_tokens: int, num_found: int, keys: Iterable[bytes] | None) -> None:
        """A prompt of `num_tokens`, of which `num_found` were in the cache.

        `keys` are those of the blocks that were looked up; None if the cache was not to be read.
        """
        self.queries += num_tokens
        self.hits += num_found
        if keys is None:
            self.unread += num_tokens
            return
        size, at = pool.block_size, num_found
        for key in islice(keys, num_found // size, num_tokens // size):
            at += size
            if pool.was_evicted(key):
                self.evicted += size
            else:
                self.new += size
        self.tail += num_tokens - at
