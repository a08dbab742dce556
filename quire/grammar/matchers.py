"""Where each constrained sequence of a runner stands in its grammar, and what it may sample next. Knows no logits.

A sequence's newest token is asked for only when the next mask is made: on a device that computes while the host goes
on, that is while the next forward pass runs. All ranks that sample do the same, as they draw the same tokens.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import llguidance
import numpy as np

from quire.grammar.compiling import Vocabulary, masks, too_complex
from quire.types import Grammar, Thoughts

MOST_KEPT = 64  # grammars without a sequence; the next request often has the same

SPECIAL = b"\xff"  # llguidance writes it before the name of a special token


class Place:
    """One sequence's."""

    def __init__(self, vocabulary: Vocabulary, matcher: llguidance.LLMatcher, thoughts: Thoughts | None):
        self.vocabulary, self.matcher, self.thoughts = vocabulary, matcher, thoughts
        self.thinks = thoughts is not None and thoughts.begun
        self.tail, self.num_tokens = b"", 0
        self.newest: Callable[[], int] | None = None  # not taken in yet

    @property
    def may_think(self) -> int | None:
        """The token that would begin thoughts here; None if none can."""
        if self.thoughts is None or self.num_tokens or self.thinks:
            return None
        tokens = self.vocabulary.tokens.tokenize_str(self.thoughts.open.strip(), parse_special=True)
        return tokens[0] if len(tokens) == 1 else None

    def take(self, token: int) -> None:
        """Go on by a token."""
        begins, self.num_tokens = token == self.may_think, self.num_tokens + 1
        if begins:
            self.thinks = True
        elif self.thinks and self.thoughts is not None:
            self.tail += self.vocabulary.tokens.decode_bytes([token]).replace(SPECIAL, b"")
            close = self.thoughts.close.strip().encode()
            self.thinks = close not in self.tail
            self.tail = self.tail[-len(close) :]
        else:
            self.matcher.consume_token(token)

    def settle(self) -> None:
        """Take in the newest token; waits for it."""
        if self.newest is not None:
            newest, self.newest = self.newest, None
            self.take(newest())


class Allowed:
    """What rows of a batch may sample.

    Attributes:
        rows: the constrained ones.
        words: [len(rows), num_words] int32, token i's bit is bit i % 32 of word i // 32.
        errors: by sequence; what its row samples means nothing.
    """

    __slots__ = ("errors", "rows", "words")

    def __init__(self, rows: list[int], words: np.ndarray, errors: dict[int, str]):
        self.rows, self.words, self.errors = rows, words, errors


class Matchers:
    """By sequence. Compilation runs in a thread of its own, and lets others run meanwhile."""

    def __init__(self, load: Callable[[], tuple[str, Collection[int]]], vocab_size: int, num_threads: int):
        """`load`: the contents of tokenizer.json, and tokens that end a text."""
        self.load, self.vocab_size, self.num_threads = load, vocab_size, num_threads
        self.compiled: OrderedDict[str, Future[llguidance.LLMatcher]] = OrderedDict()
        self.known: dict[int, tuple[Grammar, Future[llguidance.LLMatcher]]] = {}
        self.places: dict[int, Place] = {}

    def prepare(self, grammar: Grammar) -> Future[llguidance.LLMatcher]:
        """Begin to compile; the result raises InvalidRequest if that cannot be done."""
        if grammar.text not in self.compiled:
            self.compiled[grammar.text] = self.compiler.submit(lambda: self.vocabulary.matcher(grammar.text))
            if len(self.compiled) > MOST_KEPT:
                self.compiled.popitem(last=False)
        self.compiled.move_to_end(grammar.text)
        return self.compiled[grammar.text]

    def register(self, seq: int, grammar: Grammar) -> None:
        """A sequence has it, from now until it is forgotten."""
        self.known[seq] = grammar, self.prepare(grammar)

    def begin(self, seq: int, outputs: Sequence[int]) -> None:
        """A sequence begins to run, or again, with these outputs.

        Raises:
            InvalidRequest: its grammar cannot be compiled.
        """
        if (known := self.known.get(seq)) is None:
            return
        grammar, compiled = known
        matcher = compiled.result().deep_copy()  # first of all: that is what made the vocabulary
        place = Place(self.vocabulary, matcher, grammar.thoughts)
        for token in outputs:
            place.take(token)
        self.places[seq] = place

    def drew(self, seq: int, newest: Callable[[], int]) -> None:
        """A sequence's newest token is drawn; `newest` waits for it."""
        if seq in self.places:
            self.places[seq].newest = newest

    def allowed(self, seqs: Sequence[int]) -> Allowed | None:
        """What the rows of a batch may sample; None if everything. Waits for their newest tokens."""
        places = {row: self.places[seq] for row, seq in enumerate(seqs) if seq in self.places}
        for place in places.values():
            place.settle()
        bound = {row: place for row, place in places.items() if not place.thinks}
        if not bound:
            return None
        words = masks(self.executor, [place.matcher for place in bound.values()], self.vocabulary.num_words)
        errors: dict[int, str] = {}
        for at, (row, place) in enumerate(bound.items()):
            if place.matcher.is_error():
                errors[seqs[row]] = too_complex(place.matcher)
                words[at] = -1
            elif (token := place.may_think) is not None:
                words[at, token // 32] |= np.int32(np.uint32(1 << token % 32).view(np.int32))
        return Allowed(list(bound), words, errors)

    def forget(self, seq: int) -> None:
        """A sequence has ended."""
        self.known.pop(seq, None)
        self.places.pop(seq, None)

    def concerns(self, seqs: Iterable[int]) -> bool:
        """Whether any of them has a grammar."""
        return bool(self.known) and any(seq in self.known for seq in seqs)

    def __contains__(self, seq: int) -> bool:
        return seq in self.known

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Made when it is first needed: that takes a second or two."""
        tokenizer, ends = self.load()
        return Vocabulary(tokenizer, self.vocab_size, ends)

    @cached_property
    def compiler(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="quire-grammars")

    @cached_property
    def executor(self) -> llguidance.LLExecutor:
        return llguidance.LLExecutor(self.num_threads)
