"""llguidance, within our limits: its tokenizer, and matchers of grammars. Knows no sequence.

The limits bound what one grammar costs: its memory, its own compilation, and each of its masks. What exceeds them
ends in an error of that matcher.
"""

import json
from collections.abc import Collection

import llguidance
import numpy as np

from quire.errors import InvalidRequest

LIMITS = llguidance.LLParserLimits(
    max_lexer_states=20_000,  # of 1 to 2 kB
    step_lexer_fuel=100_000,  # a mask's, some milliseconds
    step_max_items=50_000,
)
MOST_CHARS = 500  # of what is wrong


class Vocabulary:
    """A model's tokens, as grammars see them.

    Attributes:
        num_words: of a mask, in which token i is bit i % 32 of word i // 32.
    """

    def __init__(self, tokenizer: str, vocab_size: int, eos_token_ids: Collection[int]):
        """`tokenizer`: the contents of tokenizer.json, which may have fewer or more tokens than the model.

        Raises:
            InvalidRequest: it is of a kind that llguidance does not know, or texts have no end.
        """
        ends = sorted(token for token in eos_token_ids if token < vocab_size)
        if not ends:
            raise InvalidRequest(
                "this model has no token that ends a text, so no text could be complete; leave structured_outputs out",
                param="structured_outputs",
            )
        try:
            plain = llguidance.LLTokenizer(tokenizer, eos_token=ends, slices=[])
            size = max(vocab_size, plain.vocab_size)
            self.tokens = llguidance.LLTokenizer(tokenizer, n_vocab=size, eos_token=ends)
        except Exception as error:  # whatever it says of a tokenizer
            raise InvalidRequest(
                f"this model's tokenizer cannot be used with structured_outputs: {str(error)[:MOST_CHARS]}",
                param="structured_outputs",
            ) from None
        self.num_words = -(-size // 32)

    def matcher(self, grammar: str) -> llguidance.LLMatcher:
        """At the beginning of a text.

        Raises:
            InvalidRequest: it is no grammar, or too complex; the message says why.
        """
        matcher = llguidance.LLMatcher(self.tokens, grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise InvalidRequest(
                f"the grammar cannot be used: {_reason(matcher)}", param="structured_outputs"
            )
        return matcher


def special_tokens(vocabulary: Vocabulary, tokenizer: str) -> dict[str, int | None]:
    """Those that no plain text is matched by -> their ids; those that end a text have none."""
    ends = set(vocabulary.tokens.eos_tokens)
    added = {each["content"]: each["id"] for each in json.loads(tokenizer).get("added_tokens") or ()}
    return {
        text: None if token in ends else token
        for text, token in added.items()
        if text and vocabulary.tokens.is_special_token(token)
    }


def masks(
    executor: llguidance.LLExecutor, matchers: Collection[llguidance.LLMatcher], num_words: int
) -> np.ndarray:
    """What each may be followed by: [M, num_words] int32. Afterwards a matcher may be in error."""
    words = np.zeros((len(matchers), num_words), np.int32)
    rows = [(matcher, row) for row, matcher in enumerate(matchers)]
    executor.unsafe_compute_mask_ptr(rows, words.ctypes.data, num_words * 4, len(rows))
    return words


def too_complex(matcher: llguidance.LLMatcher) -> str:
    """What is wrong with one that got into an error on its way."""
    return f"the grammar is too complex: {_reason(matcher)}"


def _reason(matcher: llguidance.LLMatcher) -> str:
    """Without the parser's state, which follows."""
    return matcher.get_error().partition("\n<state>")[0][:MOST_CHARS]
