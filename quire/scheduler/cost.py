"""How long a step takes, learned from the steps so far. Knows no sequences.

Steps are grouped by powers of two of their tokens; each group keeps moving averages of tokens and seconds,
and straight lines join the groups.
"""

from dataclasses import dataclass

WEIGHT = 0.1  # of the newest step, once a group has seen ten


@dataclass(slots=True)
class Group:
    """Steps of similar size."""

    num_steps: int = 0
    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Move the averages towards one more step."""
        self.num_steps += 1
        weight = max(1 / max(self.num_steps - 1, 1), WEIGHT)
        self.tokens += weight * (tokens - self.tokens)
        self.seconds += weight * (seconds - self.seconds)


class StepCost:
    """An online model of step time by number of tokens. Times are seconds on the caller's clock."""

    def __init__(self) -> None:
        self._groups: dict[int, Group] = {}
        self._begun: dict[int, tuple[int, float]] = {}  # step -> its tokens, and when it was planned
        self._last_end = float("-inf")

    def begin(self, step: int, tokens: int, now: float) -> None:
        """A step was planned."""
        self._begun[step] = (tokens, now)

    def end(self, step: int, now: float) -> None:
        """A step's results are here. It began when it was planned, or when the one before it ended."""
        tokens, begun = self._begun.pop(step)
        seconds = now - max(begun, self._last_end)
        self._last_end = now
        if seconds > 0:
            self._groups.setdefault(tokens.bit_length(), Group()).add(tokens, seconds)

    def predict(self, tokens: int) -> float | None:
        """Seconds that a step takes; None before the first one was measured."""
        curve = self._curve()
        return _seconds(curve, tokens) if curve else None

    def least(self, tokens: int) -> float:
        """Seconds of a step, at least: fewer tokens than any step had count in proportion. 0: nothing is known."""
        curve = self._curve()
        return _seconds(curve, tokens) * min(tokens / curve[0][0], 1.0) if curve else 0.0

    def most_tokens(self, seconds: float) -> int | None:
        """The largest step predicted to take no longer; None before the first one was measured.

        Beyond the largest group time is taken to be proportional: steps have a fixed cost, so that errs on
        the side of safety, and the next measurement corrects it.
        """
        curve = self._curve()
        if not curve:
            return None
        low, fast = curve[0]
        if fast > seconds:
            return 0
        for high, slow in curve[1:]:
            if slow > seconds:
                return int(low + (high - low) * (seconds - fast) / (slow - fast))
            low, fast = high, slow
        return int(low * seconds / fast)

    def _curve(self) -> list[tuple[float, float]]:
        """Tokens and seconds of the groups, ascending in both.

        A group slower than a larger one was measured while something else was slow; the larger one's time
        holds.
        """
        curve: list[tuple[float, float]] = []
        ceiling = float("inf")
        for _, group in sorted(self._groups.items(), reverse=True):
            ceiling = min(ceiling, group.seconds)
            curve.append((group.tokens, ceiling))
        curve.reverse()
        for at in range(1, len(curve)):
            (low, fast), (high, slow) = curve[at - 1 : at + 1]
            curve[at] = high, min(slow, fast * high / low)
        return curve


def _seconds(curve: list[tuple[float, float]], tokens: int) -> float:
    """By the line between the two groups around; beyond the largest in proportion."""
    (low, fast), *rest = curve
    for high, slow in rest:
        if tokens <= high:
            break
        low, fast = high, slow
    else:
        return fast * max(tokens / low, 1.0)
    if tokens <= low:
        return fast
    return fast + (slow - fast) * (tokens - low) / (high - low)
