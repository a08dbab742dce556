"""How many prompt tokens the cache had, and why it lacked the others (`CacheMisses`). Knows no policy.

Why is told for each block from the first that was not taken over. What a full block cannot hold is never found, nor is
a prompt's last token, which is always computed.
"""

from dataclasses import dataclass

from quire.scheduler.blocks import BlockPool
from quire.scheduler.sequence import Sequence
from quire.scheduler.sharing import Sharing
from quire.types import CacheMisses


@dataclass(slots=True)
class Lookups:
    """Totals in tokens."""

    queries: int = 0
    hits: int = 0
    misses: CacheMisses = CacheMisses()

    def count(self, seq: Sequence, pool: BlockPool, sharing: Sharing, num_found: int, num_there: int) -> None:
        """Note what a sequence that is about to be seated takes over: its first `num_found` blocks.

        The first `num_there` could be, if states of recurrent layers were kept at their ends.
        """
        num_tokens = len(seq.new.prompt)
        seq.stats.num_cached_tokens = num_cached = min(num_found * pool.block_size, num_tokens)
        if seq.new.read_cache and pool.caching:
            misses = _misses(seq, pool, sharing, num_found, num_there)
        else:
            misses = CacheMisses(unread=num_tokens - num_cached)
        seq.stats.cache_misses = misses
        self.queries += num_tokens
        self.hits += num_cached
        self.misses += misses


def _misses(seq: Sequence, pool: BlockPool, sharing: Sharing, num_found: int, num_there: int) -> CacheMisses:
    num_tokens, size = len(seq.new.prompt), pool.block_size
    full = max(num_tokens // size, num_found)
    there = min(num_there, full)
    num_looked_up = min(full, len(seq.kv.keys))
    evicted = unfinished = 0
    for key in seq.kv.keys[there:num_looked_up]:
        if sharing.is_promised(key):
            unfinished += size
        elif pool.was_evicted(key):
            evicted += size
    return CacheMisses(
        new=(num_looked_up - there) * size - unfinished - evicted,
        evicted=evicted,
        unfinished=unfinished,
        stateless=(there - num_found) * size,
        tail=max(num_tokens - num_looked_up * size, 0),
    )
