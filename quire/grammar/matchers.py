"""Where each constrained sequence of a runner stands in its grammar, and what it may sample next. Knows no logits.

A sequence's newest token is asked for only when the next mask is made: while the next forward pass runs, on a device
that computes while the host goes on, and on the host beside it. All ranks that sample do the same, as they draw the
same tokens.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import llguidance
import numpy as np

from quire.grammar.compiling import Vocabulary, masks, too_complex
from quire.grammar.thinking import Bounded, Thinking
from quire.text.tokenizer import Tokenizer
from quire.types import Grammar

MOST_KEPT = 64  # grammars without a sequence; the next request often has the same

MOST_PENDING = 4  # tokens of one sequence: of older steps the scheduler has them too, so nobody waits


class Place:
    """One sequence's: in its grammar, in the thoughts before that, in the budget that they have; each may be missing.

    Attributes:
        thinking: None once it is over.
        pending: newest tokens that are not taken in yet, each as a row of what a call waits for.
    """

    def __init__(
        self, matcher: llguidance.LLMatcher | None, thinking: Thinking | None, budget: Bounded | None
    ):
        self.matcher, self.thinking, self.budget = matcher, thinking, budget
        self.pending: deque[tuple[Callable[[], Sequence[int]], int]] = deque()

    @property
    def may_think(self) -> int | None:
        """The token that would begin thoughts here; None if none can."""
        return self.thinking.opening if self.thinking is not None and not self.thinking.thinks else None

    @property
    def forced(self) -> int | None:
        """The token that must come next; None if several may."""
        return self.budget.forced[0] if self.budget is not None and self.budget.forced else None

    @property
    def follows(self) -> llguidance.LLMatcher | None:
        """What says which tokens of the text may come next; None if none does."""
        thinks = self.thinking is not None and self.thinking.thinks
        return None if thinks or self.forced is not None else self.matcher

    @property
    def bound(self) -> bool:
        """Whether something may be excluded next, as far as can be told without the pending tokens."""
        budget, num_pending = self.budget, len(self.pending)
        return self.matcher is not None or (
            budget is not None and budget.num_tokens + num_pending >= budget.graceful
        )

    @property
    def over(self) -> bool:
        """Nothing will be excluded any more."""
        return self.matcher is None and (self.budget is None or self.budget.over)

    def take(self, token: int) -> None:
        """Go on by a token."""
        if token < 0:  # none: the sequence has ended
            return
        no_text = self.budget is not None and self.budget.take(token)
        if self.thinking is not None:
            thought = self.thinking.thinks
            self.thinking.take(token)
            no_text |= thought or self.thinking.thinks
            if not self.thinking.thinks:
                self.thinking = None
        if self.matcher is not None and not no_text:
            self.matcher.consume_token(token)

    def settle(self, num_pending: int = 0) -> None:
        """Take in all but so many newest tokens; waits for them."""
        while len(self.pending) > num_pending:
            tokens, row = self.pending.popleft()
            self.take(tokens()[row])


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

    def __init__(
        self, load: Callable[[], tuple[Tokenizer, Collection[int]]], vocab_size: int, num_threads: int
    ):
        """`load`: the tokenizer, and tokens that end a text."""
        self.load, self.vocab_size, self.num_threads = load, vocab_size, num_threads
        self.compiled: OrderedDict[str | None, Future[llguidance.LLMatcher | None]] = OrderedDict()
        self.known: dict[int, tuple[Grammar, Future[llguidance.LLMatcher | None]]] = {}
        self.places: dict[int, Place] = {}
        self.foreseen: tuple[Sequence[int], Future[Allowed | None]] | None = None

    def prepare(self, grammar: Grammar) -> Future[llguidance.LLMatcher | None]:
        """Begin to compile; the result raises InvalidRequest if that cannot be done."""
        if grammar.text not in self.compiled:
            self.compiled[grammar.text] = self.compiler.submit(self._compile, grammar.text)
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
        matcher = compiled.result()  # first of all: that is what loaded the tokenizer
        (tokenizer, _), thoughts, budget = self.loaded, grammar.thoughts, grammar.budget
        place = Place(
            None if matcher is None else matcher.deep_copy(),
            None if thoughts is None else Thinking(thoughts, tokenizer),
            None if budget is None else Bounded(budget, tokenizer),
        )
        for token in outputs:
            place.take(token)
        self.places[seq] = place
        self._settle(seq, place)

    def drew(self, seqs: Iterable[int], tokens: Callable[[], Sequence[int]]) -> None:
        """Each of these got a token; `tokens` waits for them, and may be called again."""
        if not self.places:
            return
        for row, seq in enumerate(seqs):
            if (place := self.places.get(seq)) is not None:
                place.pending.append((tokens, row))
                if len(place.pending) > MOST_PENDING:
                    self._settle(seq, place, MOST_PENDING)

    def foresee(self, seqs: Sequence[int]) -> None:
        """Begin to find out in a thread what `allowed` will be asked for, while others compute on the host."""
        self._wait()
        self.foreseen = seqs, self.foreseer.submit(self._allowed, seqs)

    def allowed(self, seqs: Sequence[int]) -> Allowed | None:
        """What the rows of a batch may sample; None if everything. Waits for their newest tokens."""
        foreseen = self._wait()
        if foreseen is not None and foreseen[0] == seqs:
            return foreseen[1].result()
        return self._allowed(seqs)

    def _wait(self) -> tuple[Sequence[int], "Future[Allowed | None]"] | None:
        """What was foreseen: matchers are for one thread at a time, and what they allow is right once."""
        foreseen, self.foreseen = self.foreseen, None
        if foreseen is not None:
            foreseen[1].exception()
        return foreseen

    def _allowed(self, seqs: Sequence[int]) -> Allowed | None:
        places = {row: self.places[seq] for row, seq in enumerate(seqs) if seq in self.places}
        places = {row: place for row, place in places.items() if place.bound}
        for row, place in places.items():
            self._settle(seqs[row], place)
        forced = {row: token for row, place in places.items() if (token := place.forced) is not None}
        ruled = {row: matcher for row, place in places.items() if (matcher := place.follows) is not None}
        if not forced and not ruled:
            return None
        words = np.zeros((0, -(-self.vocab_size // 32)), np.int32)
        if ruled:
            words = masks(self.executor, list(ruled.values()), self.vocabulary.num_words)
        errors: dict[int, str] = {}
        for at, (row, matcher) in enumerate(ruled.items()):
            if matcher.is_error():
                errors[seqs[row]] = too_complex(matcher)
                words[at] = -1
            elif (token := places[row].may_think) is not None:
                _allow(words[at], token)
        if forced:
            words = np.concatenate([words, np.zeros((len(forced), words.shape[1]), np.int32)])
        for at, token in enumerate(forced.values(), len(ruled)):
            _allow(words[at], token)
        return Allowed([*ruled, *forced], words, errors)

    def forget(self, seq: int) -> None:
        """A sequence has ended."""
        self.known.pop(seq, None)
        self.places.pop(seq, None)

    def concerns(self, seqs: Iterable[int]) -> bool:
        """Whether something may be excluded for any of them."""
        return bool(self.places) and any(seq in self.places and self.places[seq].bound for seq in seqs)

    def __contains__(self, seq: int) -> bool:
        return seq in self.known

    def _compile(self, text: str | None) -> llguidance.LLMatcher | None:
        """None for no grammar, which needs no more than what is loaded."""
        return self.vocabulary.matcher(text) if self.loaded and text is not None else None

    def _settle(self, seq: int, place: Place, num_pending: int = 0) -> None:
        place.settle(num_pending)
        if place.over:
            self.places.pop(seq, None)  # it may be forgotten meanwhile

    @cached_property
    def loaded(self) -> tuple[Tokenizer, Collection[int]]:
        """What is there when it is first needed."""
        return self.load()

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Made when it is first needed: that takes a second or two."""
        tokenizer, ends = self.loaded
        return Vocabulary(tokenizer.to_json(), self.vocab_size, ends)

    @cached_property
    def compiler(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="quire-grammars")

    @cached_property
    def foreseer(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="quire-masks")

    @cached_property
    def executor(self) -> llguidance.LLExecutor:
        return llguidance.LLExecutor(self.num_threads)


def _allow(words: np.ndarray, token: int) -> None:
    words[token // 32] |= np.int32(np.uint32(1 << token % 32).view(np.int32))
