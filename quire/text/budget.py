"""What one rendering of a template may use, and how large its results will be. Knows no template engine."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_BITS = 4096
MAX_WIDTH = 10_000
MAX_DEPTH = 100  # of calls, and of lists in lists


class OverBudget(Exception):
    """A template does more than it may."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one rendering. What it makes along the way may be 16 times `chars`."""

    seconds: float = 1.0
    steps: int = 1_000_000  # loop iterations and calls
    chars: int = 8 << 20  # of the text


class Budget:
    """What one rendering has used."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._end_s = time.monotonic() + limits.seconds
        self._steps = limits.steps
        self._chars = 16 * limits.chars
        self._depth = 0

    def step(self) -> None:
        self._steps -= 1
        if self._steps < 0:
            raise OverBudget(f"it takes more than {self._limits.steps:,} steps")
        self.check_time()

    def check_time(self) -> None:
        if time.monotonic() > self._end_s:
            raise OverBudget(f"it takes longer than {self._limits.seconds:g} s")

    def spend(self, num_chars: int) -> None:
        """Before or after that many characters (or list items) are made."""
        self._chars -= num_chars
        if self._chars < 0 or num_chars > 2 * self._limits.chars:
            raise OverBudget(f"it makes too much text; the limit is {self._limits.chars:,} characters")

    def enter(self) -> None:
        self.step()
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise OverBudget(f"its calls are nested more than {MAX_DEPTH} deep")

    def leave(self) -> None:
        self._depth -= 1

    def size(self, value: object) -> int:
        """Characters and items of `value` written out; what is shared counts each time."""
        if isinstance(value, str):
            return len(value)
        total, visits, todo = 0, 0, [(value, 0)]
        while todo:
            item, depth = todo.pop()
            visits += 1
            if visits % 1024 == 0:
                self.check_time()
            total += len(item) + 1 if isinstance(item, str) else 1
            if isinstance(item, list | tuple):
                todo += [(child, depth + 1) for child in item]
            elif isinstance(item, Mapping):
                todo += [(child, depth + 1) for pair in item.items() for child in pair]
            if depth > MAX_DEPTH or total + len(todo) > 2 * self._limits.chars:
                raise OverBudget("its lists grow too large")
        return total

    def made(self, value: Any) -> Any:
        """A new value: text costs its length, a list its items. Returns it."""
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, list | tuple | dict):
            self.spend(len(value))
            self.size(value)
        elif isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise OverBudget(f"it makes a number of more than {MAX_BITS} bits")
        return value


def check_widths(spec: str) -> int:
    """The sum of the numbers in a format."""
    widths = [int(number[:9]) for number in re.findall(r"\d+", spec)]
    if max(widths, default=0) > MAX_WIDTH:
        raise OverBudget(f"it pads to more than {MAX_WIDTH:,} characters")
    return sum(widths)


def percent_size(budget: Budget, text: str, args: object) -> int:
    """At most how long `text % args` is."""
    fields = re.findall(r"%[^a-zA-Z%]*", text)
    if any("*" in field for field in fields):
        raise OverBudget("a format takes its width from a value")
    return len(text) + sum(map(check_widths, fields)) + len(fields) * budget.size(args)


def replaced_size(budget: Budget, text: str, args: Sequence[Any]) -> int:
    """At most how long `text.replace(*args)` is."""
    old, new = (str(arg) for arg in args[:2])
    return len(text) + text.count(old) * len(new)


def joined_size(budget: Budget, separator: object, parts: object) -> int:
    """At most how long `separator.join(parts)` is."""
    number = len(parts) if isinstance(parts, list | tuple | dict | str) else 0
    return number * (len(str(separator)) + 1) + budget.size(parts)


def width_of(value: object) -> int:
    return len(value) if isinstance(value, str) else value if isinstance(value, int) else 0
