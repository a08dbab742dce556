"""KV blocks as integers: who holds them, which full ones can be found by content. Knows no sequences.

A block's key is the keyed BLAKE2b of its parent's key and its tokens, so equal keys mean equal prefixes, and
nobody without the secret can construct a collision. Where positions see later ones, what they see of later blocks is
part of it, and so is where such a span begins and ends.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from quire.errors import CapacityError, ConfigError
from quire.scheduler.near import Near
from quire.scheduler.spans import Spans, within
from quire.types import Coordinates

KEY_BYTES = 16
MAX_EVICTED = 1 << 16  # keys of those that made room, remembered for statistics only


class BlockPool:
    """Counts holders of blocks 0 .. num_blocks - 1, and finds the least recently used free one.

    With `caching` off a block is findable only while somebody holds it.

    Raises:
        ConfigError: a size below 1, or a secret that BLAKE2b does not take.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        secret: bytes,
        caching: bool = True,
        near: Near | None = None,
    ):
        """`near`: how layers use the blocks that do not see all positions, if there are any."""
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(
                f"the cache has {num_blocks} blocks of {block_size} tokens; both must be at least 1"
            )
        if not 0 < len(secret) <= blake2b.MAX_KEY_SIZE:
            raise ConfigError(
                f"the cache secret has {len(secret)} bytes; it must have 1 to {blake2b.MAX_KEY_SIZE}"
            )
        self.num_blocks, self.block_size, self.caching, self.near = num_blocks, block_size, caching, near
        self.refs = [0] * num_blocks
        self.free = OrderedDict.fromkeys(range(num_blocks))  # the next to be taken first
        self.key_of: dict[int, bytes] = {}
        self.by_key: dict[bytes, int] = {}
        self._evicted: OrderedDict[bytes, None] = OrderedDict()
        self._hash = blake2b(digest_size=KEY_BYTES, key=secret)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, findable ones included."""
        return len(self.free)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - len(self.free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many positions fill."""
        return -(-num_tokens // self.block_size)

    def extend_keys(
        self,
        keys: list[bytes],
        root: bytes,
        tokens: "array[int]",
        num: int,
        coordinates: Coordinates | None = None,
        spans: Spans = (),
    ) -> None:
        """Bring a chain's keys up to `num` full blocks; tokens and coordinates enter them as 64-bit integers."""
        size = self.block_size
        parent = keys[-1] if keys else root
        for i in range(len(keys), num):
            first, last = i * size, (i + 1) * size
            block = self._hash.copy()
            block.update(parent + tokens[first:last].tobytes())
            if coordinates is not None:
                block.update(_apart(coordinates, first, last))
            for span in within(spans, first, last) if spans else ():
                block.update(array("q", span).tobytes() + tokens[last : span[1]].tobytes())
            keys.append(parent := block.digest())

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Blocks that hold the longest cached beginning of a chain. Takes no hold."""
        found: list[int] = []
        for key in keys:
            if (block := self.by_key.get(key)) is None:
                break
            found.append(block)
        return found

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of these nobody holds."""
        return sum(not self.refs[block] for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        """Share blocks that `match` found."""
        for block in blocks:
            if not self.refs[block]:
                del self.free[block]
            self.refs[block] += 1

    def take(self, num: int) -> list[int]:
        """`num` blocks to write into; what they held is forgotten.

        Raises:
            CapacityError: fewer are free; none is taken.
        """
        if num > len(self.free):
            raise CapacityError(f"{num} blocks are needed and {len(self.free)} are free; release some first")
        taken: list[int] = []
        for _ in range(num):
            block, _ = self.free.popitem(last=False)
            if (key := self._forget(block)) is not None:
                self._evicted[key] = None
            self.refs[block] = 1
            taken.append(block)
        while len(self._evicted) > MAX_EVICTED:
            self._evicted.popitem(last=False)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one hold on each block of a chain, given from its head."""
        for block in reversed(blocks):  # so that a chain's tail is evicted before its head
            self.refs[block] -= 1
            if self.refs[block]:
                continue
            if not self.caching:
                self._forget(block)
            self.free[block] = None
            if block not in self.key_of:
                self.free.move_to_end(block, last=False)  # nothing to lose: take it before any findable one

    def publish(self, key: bytes, block: int) -> None:
        """Make a full, written block findable, unless another one holds the same content."""
        if key not in self.by_key and block not in self.key_of:
            self.by_key[key], self.key_of[block] = block, key

    def forget(self, blocks: Iterable[int]) -> None:
        """Let nobody find these any more."""
        for block in blocks:
            self._forget(block)

    def was_evicted(self, key: bytes) -> bool:
        """Of a block that `match` did not find: it was there not long ago, or is, behind one that is not."""
        return key in self._evicted or key in self.by_key

    def _forget(self, block: int) -> bytes | None:
        if (key := self.key_of.pop(block, None)) is not None:
            del self.by_key[key]
        return key


def _apart(coordinates: Coordinates, first: int, last: int) -> bytes:
    """What a block's coordinates add to its key: nothing where they are the tokens' numbers, as without any."""
    rows, usual = coordinates.between(first, last), tuple(range(first, last))
    return b"" if rows == (usual,) * len(rows) else b"".join(array("q", row).tobytes() for row in rows)
