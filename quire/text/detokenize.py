"""Token ids to text as they come: whole characters, up to a stop string. Knows no engine and no model."""

import codecs
from collections import deque
from collections.abc import Mapping, Sequence

from quire.text.tokenizer import Tokenizer


class StopStrings:
    """Finds the stop string that completes first, reading each character once (Aho and Corasick 1975).

    A node is a string that some stop string begins with; the current node is the longest such string that
    the text ends with, so its depth is how many characters may still turn out to begin a stop string.
    """

    def __init__(self, stop: Sequence[str]):
        self.stop = tuple(stop)
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        self._depth = [0]
        self._match = [len(self.stop)]  # the first in the list that the node ends with
        for index, word in enumerate(self.stop):
            node = 0
            for char in word:
                node = self._next[node].get(char) or self._add(node, char)
            self._match[node] = min(self._match[node], index)
        self._link()
        self._node = 0

    def _add(self, parent: int, char: str) -> int:
        node = len(self._next)
        self._next[parent][char] = node
        self._next.append({})
        self._fail.append(0)
        self._depth.append(self._depth[parent] + 1)
        self._match.append(len(self.stop))
        return node

    def _link(self) -> None:
        """Each node's longest proper suffix that is a node, breadth first."""
        todo = deque(self._next[0].values())
        while todo:
            node = todo.popleft()
            self._match[node] = min(self._match[node], self._match[self._fail[node]])
            for char, child in self._next[node].items():
                self._fail[child] = self._step(self._fail[node], char)
                todo.append(child)

    def _step(self, node: int, char: str) -> int:
        while node and char not in self._next[node]:
            node = self._fail[node]
        return self._next[node].get(char, 0)

    @property
    def held(self) -> int:
        """Characters at the end of the text so far that may be the beginning of a stop string."""
        return self._depth[self._node]

    def feed(self, text: str, *, count: bool = True) -> tuple[str, int] | None:
        """The stop string that completes in `text`, and how many characters of `text` that takes.

        With `count` off, stop strings that complete in `text` do not count.
        """
        if not self._node and self._next[0].keys().isdisjoint(text):
            return None
        node = self._node
        for position, char in enumerate(text):
            node = self._step(node, char)
            if count and self._match[node] < len(self.stop):
                return self.stop[self._match[node]], position + 1
        self._node = node
        return None


class Detokenizer:
    """One sequence's text.

    The pieces that `push` and `finish` return add up to the text. A character comes when its last byte has
    come, bytes that can never become one come as U+FFFD.

    Attributes:
        stopped: the stop string that ended the text, if one did; further tokens are ignored.
        num_tokens: tokens that belong to the text, up to the one that completed the stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        marks: Mapping[int, str] | None = None,
    ):
        """`include_stop` keeps the stop string; one that completes within `min_tokens` does not count.

        `marks` are characters that stand for special tokens, whether these are skipped or not.
        """
        self.stopped: str | None = None
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._begun = any(token not in self._skip for token in reversed(prompt_ids))
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # a prompt of token ids may end within a character
        self._utf8.decode(b"".join(map(tokenizer.token_bytes, prompt_ids[-3:])))
        self._marks = marks or {}
        self._stops = StopStrings(stop) if stop else None
        self._include = include_stop
        self._min_tokens = min_tokens
        self._held = ""  # text that may be the beginning of a stop string

    def push(self, tokens: Sequence[int], *, ended_by_token: bool = False) -> str:
        """Takes the next tokens; returns the text that can be shown now.

        `ended_by_token` says that the last token is a stop token: it is no text unless `include_stop`.
        """
        mute = ended_by_token and not self._include
        if self._stops is None:
            self.num_tokens += len(tokens)
            return self._text(tokens[:-1] if mute else tokens)
        shown = ""
        for position, token in enumerate(tokens):
            if self.stopped is not None:
                break
            self.num_tokens += 1
            if not (mute and position == len(tokens) - 1):
                shown += self._show(self._text((token,)))
        return shown

    def finish(self) -> str:
        """What is left: text held back, and bytes that no longer can become a character."""
        if self.stopped is not None:
            return ""
        shown = self._show(self._utf8.decode(b"", final=True))
        rest, self._held = self._held, ""
        return shown + rest

    def _text(self, tokens: Sequence[int]) -> str:
        if self._marks.keys().isdisjoint(tokens):
            return self._utf8.decode(b"".join(map(self._bytes, tokens)))
        text = ""
        for token in tokens:
            mark = self._marks.get(token)
            text += self._utf8.decode(b"" if mark else self._bytes(token), final=mark is not None) + (
                mark or ""
            )
        return text

    def _bytes(self, token: int) -> bytes:
        if token in self._skip:
            return b""
        if self._begun:
            return self._tokenizer.token_bytes(token)
        self._begun = True
        return self._tokenizer.first_bytes(token)

    def _show(self, text: str) -> str:
        """Of the held text and `text` that follows it, what no stop string can still take back."""
        if self._stops is None or not text:
            return text
        held, self._held = self._held, ""
        found = self._stops.feed(text, count=self.num_tokens > self._min_tokens)
        if found:
            self.stopped, end = found
            known = held + text[:end]
            return known if self._include else known[: len(known) - len(self.stopped)]
        known = held + text
        cut = len(known) if self._include else len(known) - self._stops.held
        self._held = known[cut:]
        return known[:cut]
