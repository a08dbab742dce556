"""Why sequences missed what they did, as told by what could be found before a step was planned and after it."""

from quire.scheduler.scheduler import Scheduler
from quire.scheduler.sequence import Sequence
from quire.scheduler.spans import whole_blocks


class Misses:
    """Checks the reasons of each sequence that a plan seats for the first time."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.gone: set[bytes] = set()  # keys of blocks that made room
        self.before: set[bytes] = set()  # keys of what could be found
        self.there: dict[int, int] = {}  # blocks of those that wait that could be taken over but for states
        self.num_preemptions = 0

    def about_to_schedule(self) -> None:
        waiting = [seq for seq in self.scheduler.seqs.values() if seq.stats.seated_s is None]
        self.before = set(self.scheduler.pool.by_key)
        self.there = {seq.id: self._num_there(seq) for seq in waiting}
        self.num_preemptions = self.scheduler.num_preemptions

    def scheduled(self) -> None:
        """After the plan; only here do blocks make room."""
        seated = [
            s for s in self.scheduler.seqs.values() if s.id in self.there and s.stats.seated_s is not None
        ]
        for seq in seated:
            self._check(seq)
        if self.scheduler.pool.caching:
            self.gone |= self.before - set(self.scheduler.pool.by_key)

    def _keys(self, seq: Sequence) -> list[bytes]:
        """Of all blocks that a sequence looks up."""
        keys: list[bytes] = []
        num = (len(seq.new.prompt) + len(seq.new.output) - 1) // self.scheduler.pool.block_size
        num = whole_blocks(seq.new.spans, num, self.scheduler.pool.block_size)
        self.scheduler.pool.extend_keys(keys, seq.new.cache_root, seq.tokens, num, spans=seq.new.spans)
        return keys

    def _num_there(self, seq: Sequence) -> int:
        return len(self.scheduler.holdings.find(self._keys(seq)).blocks)

    def _check(self, seq: Sequence) -> None:
        scheduler, misses = self.scheduler, seq.stats.cache_misses
        assert misses is not None
        size, num_cached, num_tokens = (
            scheduler.pool.block_size,
            seq.stats.num_cached_tokens,
            len(seq.new.prompt),
        )
        assert num_cached + sum(misses.by_reason().values()) == num_tokens
        assert all(num > 0 for num in misses.by_reason().values())
        if not (seq.new.read_cache and scheduler.pool.caching):
            assert misses.unread == num_tokens - num_cached
            return
        assert not misses.unread
        keys = self._keys(seq)[: num_tokens // size]
        num_found = num_cached // size
        assert misses.tail == num_tokens - max(len(keys) * size, num_cached)
        there = num_found + misses.stateless // size
        if scheduler.checkpoints is None:
            assert not misses.stateless
        elif self.there[seq.id] == self._num_there(seq):  # nothing of it made room meanwhile
            assert there == max(min(self.there[seq.id], len(keys)), num_found)
        missed = keys[there:]
        known = {key for key in missed if key in self.gone or key in self.before}
        owners = {key: scheduler.sharing._owner.get(key) for key in missed}
        if scheduler.num_preemptions == self.num_preemptions:  # so no promise has ended
            promised = {key for key, owner in owners.items() if owner is not seq and owner is not None}
            assert misses.unfinished == size * len(promised)
            assert misses.evicted == size * len(known - promised)
        else:
            assert misses.evicted <= size * len(known)
            assert misses.new <= size * (len(missed) - len(known))
