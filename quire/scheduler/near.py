"""Which positions layers see that do not see all before: those of a window, or of a chunk. Knows no blocks."""

from dataclasses import dataclass

from quire.errors import ConfigError

# For which a sequence takes near blocks: one that is planned, and one that nobody knows the outcome of.
STEPS_AHEAD = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Near:
    """What a network's near layers keep of a sequence, its far ones keeping everything.

    Raises:
        ConfigError: neither a window nor a chunk of positions, or none in one.
    """

    parts: int  # blocks of the pool that they take beside each one of far layers; 0: there are no far layers
    window: int | None = None  # positions that one sees, itself included
    chunk: int | None = None  # positions see those from the last multiple of it on

    def __post_init__(self) -> None:
        sizes = [size for size in (self.window, self.chunk) if size is not None]
        if not sizes or min(sizes) < 1 or self.parts < 0:
            raise ConfigError(f"{self} sees nothing; it needs a window or a chunk of at least 1 position")

    def first(self, position: int) -> int:
        """The earliest position that this one or any later one sees."""
        window, chunk = self.window, self.chunk
        in_window = position if window is None else max(position - window + 1, 0)
        return in_window if chunk is None else min(in_window, position // chunk * chunk)


@dataclass(frozen=True, slots=True)
class Extent:
    """What one sequence takes of a pool, at most; `near` is None where all layers see all positions."""

    near: Near | None
    block_size: int
    max_batched_tokens: int

    @property
    def span(self) -> int:
        """Blocks that near layers may need at once."""
        if self.near is None:
            return 0
        seen = max(self.near.window or 1, self.near.chunk or 1)
        return -(-(seen + STEPS_AHEAD * self.max_batched_tokens) // self.block_size) + 1

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks of the pool for so many positions."""
        num = -(-num_tokens // self.block_size)
        if self.near is None:
            return num
        beside = min(num, self.span)
        return num + self.near.parts * beside if self.near.parts else beside

    def longest(self, num_blocks: int) -> int | None:
        """Positions of a sequence that has so many blocks of the pool; None for any number."""
        num, parts = num_blocks, self.near.parts if self.near else 0
        if self.near is not None and not parts and self.span <= num:
            return None
        if parts:
            even = num // (1 + parts)
            num = even if even < self.span else num - parts * self.span
        return num * self.block_size
