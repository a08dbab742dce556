"""Which blocks running sequences are computing, and who waits for them. Knows no budget and no policy.

Only sequences without a seat wait, and only for sequences with one, so nobody waits in a circle.
"""

from quire.scheduler.sequence import Sequence


class Sharing:
    """Promised blocks by key. A promise ends when its block is published or its owner gives up its blocks."""

    def __init__(self) -> None:
        self._owner: dict[bytes, Sequence] = {}
        self._waiting: dict[bytes, list[Sequence]] = {}
        self._waits_for: dict[Sequence, bytes] = {}

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a promise."""
        return len(self._waits_for)

    def claim(self, seq: Sequence, num: int) -> None:
        """`seq` will compute its blocks up to `num`, of which it has the keys."""
        kv = seq.kv
        for key in kv.keys[kv.num_published : num]:
            self._owner.setdefault(key, seq)
        kv.num_claimed = num

    def num_awaited(self, seq: Sequence, first: int, last: int) -> int:
        """Up to which of its blocks others compute what `seq` would from block `first` on; `first` if it should start.

        It waits for nobody of lower priority.
        """
        for num, key in enumerate(seq.kv.keys[first:last], first):
            owner = self._owner.get(key)
            if owner is None or owner.rank[0] > seq.rank[0]:
                return num
        return last

    def is_promised(self, key: bytes) -> bool:
        """Somebody computes the block of this key."""
        return key in self._owner

    def owner(self, key: bytes) -> Sequence:
        """Who will compute the block of a key that is promised."""
        return self._owner[key]

    def park(self, seq: Sequence, key: bytes) -> None:
        """Let a sequence wait until the promise ends."""
        self._waiting.setdefault(key, []).append(seq)
        self._waits_for[seq] = key

    def leave(self, seq: Sequence) -> None:
        """A parked sequence waits no longer."""
        key = self._waits_for.pop(seq)
        self._waiting[key].remove(seq)
        if not self._waiting[key]:
            del self._waiting[key]

    def settle(self, seq: Sequence, first: int, last: int) -> list[Sequence]:
        """Blocks first .. last - 1 of `seq` are findable, or never will be; return who waits no longer."""
        woken: list[Sequence] = []
        for key in seq.kv.keys[first : min(last, seq.kv.num_claimed)]:
            if self._owner.get(key) is seq:
                del self._owner[key]
                woken += self._waiting.pop(key, ())
        for waiter in woken:
            del self._waits_for[waiter]
        return woken
