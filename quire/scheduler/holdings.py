"""What sequences hold of the pool: a block for each stretch of positions, and blocks beside it for near layers.

Near layers (near.py) keep a block's positions in `parts` further blocks of the pool, which a sequence gives up when no
position to come sees them, and takes only so far ahead. Where all layers are near, it does so with the blocks
themselves. What it gives up can still be found until it is taken by others. A beginning that is found is taken over up
to where near layers find all that the next position sees. Knows no policy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from quire.scheduler.blocks import BlockPool
from quire.scheduler.near import Extent
from quire.scheduler.sequence import Holding


@dataclass(frozen=True, slots=True)
class Hit:
    """A chain's beginning that is there. `near` are those beside blocks[passed:]; before that nobody looks."""

    blocks: Sequence[int] = ()
    near: Sequence[tuple[int, ...]] = ()
    passed: int = 0


class Holdings:
    """Takes blocks for sequences and gives them back.

    Attributes:
        beside: the blocks beside a block, of which the device has not heard yet.
    """

    def __init__(self, pool: BlockPool, max_batched_tokens: int):
        self.pool, self.near = pool, pool.near
        self.parts = self.near.parts if self.near else 0
        self.whole = self.near is not None and not self.parts  # blocks themselves are near
        self.extent = Extent(pool.near, pool.block_size, max_batched_tokens)
        self.span = self.extent.span
        self.beside: dict[int, tuple[int, ...]] = {}

    @property
    def room(self) -> int | None:
        """Positions of a sequence that has the pool for itself; None for any number."""
        return self.extent.longest(self.pool.num_blocks)

    def find(self, keys: Sequence[bytes]) -> Hit:
        """The longest beginning of a chain that can be taken over. Takes no hold."""
        pool = self.pool
        found = [pool.by_key.get(key, 0) for key in keys] if self.whole else pool.match(keys)
        if self.near is None:
            return Hit(found)
        end = at = len(found)
        while at > (first := self._first(end * pool.block_size)):
            at -= 1
            if not self._is_there(keys[at]):
                end = at
        near = [tuple(map(pool.by_key.__getitem__, self._keys(key))) for key in keys[first:end]]
        return Hit(found[:end], near if self.parts else (), first)

    def num_needed(self, hit: Hit, num_tokens: int) -> int:
        """Free blocks that `seat` takes."""
        return self.num_lacking(hit, num_tokens, self._next(hit)) + self.pool.num_idle(self.held(hit))

    def seat(self, kv: Holding, hit: Hit, num_tokens: int) -> None:
        """Hold what was found, and take the rest for so many tokens."""
        self.pool.hold(self.held(hit))
        kv.blocks, kv.near, kv.passed = list(hit.blocks), list(hit.near), hit.passed
        self.extend(kv, num_tokens, self._next(hit))

    def num_lacking(self, kv: Holding | Hit, num_tokens: int, least: int) -> int:
        """Free blocks that `extend` takes."""
        num, end = self._ends(kv, num_tokens, least)
        beside = self.parts * max(end - kv.passed - len(kv.near), 0)
        return max(num - len(kv.blocks), 0) + beside

    def extend(self, kv: Holding, num_tokens: int, least: int) -> tuple[int, ...]:
        """Blocks for `num_tokens` positions, of near layers as far ahead as they may, and for `least` at least."""
        pool, (num, end) = self.pool, self._ends(kv, num_tokens, least)
        new = pool.take(max(num - len(kv.blocks), 0))
        kv.blocks += new
        if self.parts:
            for block in kv.blocks[kv.passed + len(kv.near) : end]:
                kv.near.append(tuple(pool.take(self.parts)))
                self.beside[block] = kv.near[-1]
        kv.capacity = (kv.passed + len(kv.near) if self.parts else len(kv.blocks)) * pool.block_size
        return tuple(new)

    def give_up(self, kv: Holding, position: int) -> None:
        """Let go of near blocks that no position from this one on sees, once others can find them."""
        first = min(self._first(position), kv.num_published)
        if first <= kv.passed:
            return
        if self.whole:
            gone = kv.blocks[kv.passed : first]
        else:
            gone = [block for near in kv.near[: first - kv.passed] for block in near]
            del kv.near[: first - kv.passed]
        kv.passed = first
        self.pool.release(gone)

    def publish(self, kv: Holding, first: int, last: int) -> None:
        """Make the full blocks first .. last - 1 findable. Near ones are found beside the block that they belong to."""
        pool = self.pool
        for i in range(first, last):
            if self.parts and not self._is_there(kv.keys[i]):
                self._forget(kv.keys[i])
            if kv.keys[i] not in pool.by_key:
                near = kv.near[i - kv.passed] if self.parts else ()
                for key, block in zip(self._keys(kv.keys[i]), near, strict=True):
                    pool.publish(key, block)
                pool.publish(kv.keys[i], kv.blocks[i])

    def forget(self, kv: Holding) -> None:
        """Let nobody find what a sequence has made findable."""
        for key in kv.keys[: kv.num_published]:
            self._forget(key)

    def release(self, kv: Holding) -> None:
        """Give up everything."""
        self.pool.release(kv.blocks[kv.passed :] if self.whole else kv.blocks)
        self.pool.release([block for near in kv.near for block in near])

    def held(self, kv: Holding | Hit) -> Iterator[int]:
        """All blocks that belong to it."""
        yield from kv.blocks[kv.passed :] if self.whole else kv.blocks
        for near in kv.near:
            yield from near

    def collect(self) -> tuple[tuple[int, ...], ...]:
        """What a device has to hear: blocks, each with those beside it."""
        told = tuple((block, *near) for block, near in self.beside.items())
        self.beside.clear()
        return told

    def _first(self, position: int) -> int:
        """The first block that near layers see from a position on."""
        return self.near.first(position) // self.pool.block_size if self.near else 0

    def _next(self, hit: Hit) -> int:
        """Positions up to the first that was not found, itself included."""
        return len(hit.blocks) * self.pool.block_size + 1

    def _ends(self, kv: Holding | Hit, num_tokens: int, least: int) -> tuple[int, int]:
        """Blocks that a sequence has after `extend`, from its beginning on, and those up to which it has near ones."""
        total = self.pool.blocks_for(num_tokens)
        end = min(total, max(kv.passed + self.span, self.pool.blocks_for(least)))
        return end if self.whole else total, end

    def _keys(self, key: bytes) -> list[bytes]:
        """By which near blocks are found beside a block of this key."""
        return [key + bytes([part]) for part in range(self.parts)]

    def _is_there(self, key: bytes) -> bool:
        return all(one in self.pool.by_key for one in (key, *self._keys(key)))

    def _forget(self, key: bytes) -> None:
        found = [self.pool.by_key.get(one) for one in (key, *self._keys(key))]
        self.pool.forget(block for block in found if block is not None)
