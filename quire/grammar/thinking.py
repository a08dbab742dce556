"""Where a sequence stands in its thoughts, and how they are closed when there are too many. Knows no grammar."""

import re

from quire.text.tokenizer import Tokenizer
from quire.types import ThinkingBudget, Thoughts

KEPT_BYTES = 64  # of the newest text: more than a marker has
GRACE = 10  # the last tenth of a budget ends with the first line or sentence that does
LINE_OR_SENTENCE = re.compile(r"""(\n|(?<!\d)[.!?]["')\]]*|[。！？])\s*\Z""")


class Thinking:
    """What of a text is thoughts.

    Attributes:
        opening: the token that begins them, where it is one.
        thinks: the next token is a thought, or ends them.
        over: no more can begin.
    """

    def __init__(self, thoughts: Thoughts, tokenizer: Tokenizer):
        self.tokenizer, self.again = tokenizer, thoughts.again
        self.open, self.close = thoughts.open.encode(), thoughts.close.encode()
        self.opening = tokenizer.token_id(thoughts.open)
        self.thinks, self.over, self.tail = thoughts.begun, False, b""

    def take(self, token: int) -> None:
        """Go on by a token."""
        self.tail += self.tokenizer.token_bytes(token)
        marker = self.close if self.thinks else self.open
        before, found, after = self.tail.partition(marker)
        if found and (self.thinks or self.again or not before.strip()):
            self.thinks, self.tail = not self.thinks, after
            self.over = not self.thinks and not self.again
        elif not self.thinks and not self.again:
            self.over = not marker.startswith(self.tail.lstrip())
        self.tail = self.tail[-KEPT_BYTES:]

    @property
    def pauses(self) -> bool:
        """A line or a sentence has just ended."""
        return LINE_OR_SENTENCE.search(self.tail.decode("utf-8", "ignore")) is not None


class Bounded:
    """Thoughts that have a budget.

    Attributes:
        num_tokens: of thoughts so far.
        graceful: from so many on they may be closed.
        forced: the tokens that must come next.
        over: nothing will be forced any more.
    """

    def __init__(self, budget: ThinkingBudget, tokenizer: Tokenizer):
        self.thinking, self.budget = Thinking(budget.thoughts, tokenizer), budget
        self.num_tokens, self.graceful = 0, budget.num_tokens - budget.num_tokens // GRACE
        self.over, self.forced = False, self._closing()

    def take(self, token: int) -> bool:
        """Go on by a token; whether it was forced."""
        if self.forced[:1] == (token,):
            self.forced = self.forced[1:]
            self.over = not self.forced
            return True
        if self.over:
            return False
        thought = self.thinking.thinks
        self.thinking.take(token)
        self.num_tokens += thought and self.thinking.thinks
        self.over, self.forced = self.thinking.over, self._closing()
        return False

    def _closing(self) -> tuple[int, ...]:
        """What must come next; nothing, where thoughts may go on or are none."""
        whole, tail = self.num_tokens < self.budget.num_tokens, self.thinking.tail
        if (
            not self.thinking.thinks
            or whole
            and (self.num_tokens < self.graceful or not self.thinking.pauses)
        ):
            return ()
        first, *rest = self.budget.closing
        new_line = tail.endswith(b"\n") and rest and self.thinking.tokenizer.token_bytes(first).isspace()
        return tuple(rest) if new_line else self.budget.closing
