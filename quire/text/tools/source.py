"""Text that comes in pieces, read by generators: they yield where they need more. Reads each character once."""

import re
from collections.abc import Callable, Generator, Sequence
from functools import lru_cache

Reading = Generator[None, None, bool]
Emit = Callable[[str], object]
SPACE = re.compile(r"\s*")


class Markers:
    """Strings to look for, none of which is part of another one."""

    def __init__(self, markers: tuple[str, ...]):
        self.markers = markers
        self.pattern = re.compile("|".join(map(re.escape, markers)) if markers else r"(?!)")
        self.firsts = frozenset(marker[0] for marker in markers)
        self.longest = max(map(len, markers), default=1)

    def open_end(self, text: str, at: int) -> int:
        """Where a marker may have begun whose rest has not come; the end of the text if there is none."""
        for index in range(max(at, len(text) - self.longest + 1), len(text)):
            if text[index] in self.firsts and any(m.startswith(text[index:]) for m in self.markers):
                return index
        return len(text)


@lru_cache(maxsize=1024)
def markers_of(markers: tuple[str, ...]) -> Markers:
    return Markers(markers)


class Source:
    """The text so far.

    Attributes:
        text, at: text that has not been taken begins at `at`.
        ended: nothing more comes.
        num_taken: characters that were taken.
        kept: what was taken, while it may turn out to be ordinary text.
    """

    def __init__(self) -> None:
        self.text, self.at, self.ended, self.num_taken = "", 0, False, 0
        self.kept: list[str] | None = None

    def push(self, text: str) -> None:
        self.text, self.at = self.text[self.at :] + text, 0

    def take(self, end: int) -> str:
        """The text up to `end`."""
        piece = self.text[self.at : end]
        self.at = end
        self.num_taken += len(piece)
        if self.kept is not None:
            self.kept.append(piece)
        return piece

    def more(self) -> Reading:
        """Wait for text; False if none comes."""
        if self.ended:
            return False
        yield
        return True

    def until(
        self, markers: Markers, emit: Emit, most: int | None = None
    ) -> Generator[None, None, str | None]:
        """Emit text up to the first marker, and take that; None if none comes, or not after `most` characters."""
        limit = None if most is None else self.num_taken + most
        while True:
            found = markers.pattern.search(self.text, self.at)
            end = found.start() if found else markers.open_end(self.text, self.at)
            last = end if limit is None else min(end, self.at + limit - self.num_taken)
            if last > self.at:
                emit(self.take(last))
            if last < end:
                return None
            if found:
                return self.take(found.end())
            if not (yield from self.more()):
                if self.at < len(self.text):
                    emit(self.take(len(self.text)))
                return None

    def peek(self) -> Generator[None, None, str]:
        """The next character; "" at the end."""
        while self.at >= len(self.text):
            if not (yield from self.more()):
                return ""
        return self.text[self.at]

    def solid(self) -> Generator[None, None, str]:
        """The next character that is no white space, which is taken before it."""
        while True:
            char = yield from self.peek()
            if not char.isspace():
                return char
            found = SPACE.match(self.text, self.at)
            self.take(found.end() if found else self.at + 1)

    def one_of(self, options: Sequence[str]) -> Generator[None, None, str]:
        """Take the first of `options` that is next; "" if none is."""
        while True:
            rest = self.text[self.at : self.at + max(map(len, options), default=0)]
            waits = any(option.startswith(rest) and len(rest) < len(option) for option in options)
            if not waits or not (yield from self.more()):
                found = next((option for option in options if rest.startswith(option)), "")
                self.take(self.at + len(found))
                return found
