"""Which positions layers see that do not see all before: those of a window, or of a chunk. Knows no blocks."""

from dataclasses import dataclass

from quire.errors import ConfigError

STEPS_AHEAD = (
    2  # for which a sequence takes near blocks: one that is planned, and one that nobody knows the outcome of
)


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

    def span(self, block_size: int, max_batched_tokens: int) -> int:
        """Blocks of a sequence that near layers may need at once, if a step computes so many positions at most."""
        seen = max(self.window or 1, self.chunk or 1)
        return -(-(seen + STEPS_AHEAD * max_batched_tokens) // block_size) + 1

    def num_blocks(self, num_far: int, span: int) -> int:
        """Blocks of the pool that a sequence takes which has as many positions as `num_far` blocks have."""
        near = min(num_far, span)
        return num_far + self.parts * near if self.parts else near

    def longest(self, num_blocks: int, span: int) -> int | None:
        """The blocks' worth of positions of a sequence that has so many blocks of the pool; None for any number."""
        if not self.parts:
            return None if span <= num_blocks else num_blocks
        even = num_blocks // (1 + self.parts)
        return even if even < span else num_blocks - self.parts * span
