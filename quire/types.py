"""What users send and what they get back: plain values, validated once, importing nothing heavy."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, NotRequired, TypedDict

from quire.errors import InvalidRequest

MAX_N = 16_384
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1_024
MAX_BAD_WORDS = 128
MAX_BIASED_TOKENS = 1_024
GREEDY_BELOW = 1e-5  # temperatures below this mean greedy decoding
LOWEST_TEMPERATURE = 1e-2  # smaller positive temperatures overflow in float32 and are raised to this


class OutputKind(Enum):
    """What each output of a stream holds."""

    CUMULATIVE = "cumulative"
    DELTA = "delta"
    FINAL_ONLY = "final_only"


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


def _check(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        raise InvalidRequest(f"{name} is {value!r}; it must be {rule}", param=name)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """What the text must look like: exactly one of the first six. Names and meanings as in vLLM.

    Raises:
        InvalidRequest: none or several are given, or one is of the wrong type.
    """

    json: str | Mapping[str, Any] | None = None  # a JSON schema
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None  # Lark, or GBNF as llama.cpp's
    json_object: bool | None = None
    structural_tag: str | Mapping[str, Any] | None = None  # structures and triggers
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        texts = ("regex", "grammar", "whitespace_pattern")
        kinds = dict.fromkeys(texts, (str,)) | dict.fromkeys(("json", "structural_tag"), (str, Mapping))
        for name, kind in kinds.items():
            value = getattr(self, name)
            _check(
                value is None
                or (isinstance(value, kind) and len(value) > 0)
                or (name, value) == ("json", {}),
                name,
                value,
                "text that is not empty" if kind == (str,) else "an object, or its JSON",
            )
        if self.choice is not None:
            texts_only = isinstance(self.choice, list | tuple) and all(
                isinstance(c, str) for c in self.choice
            )
            _check(texts_only and len(self.choice) > 0, "choice", self.choice, "a list of at least one text")
            object.__setattr__(self, "choice", tuple(self.choice))
        given = [name for name in CONSTRAINTS if getattr(self, name) not in (None, False)]
        _check(len(given) == 1, "structured_outputs", given, f"exactly one of {', '.join(CONSTRAINTS)}")


CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass(frozen=True, slots=True)
class Thoughts:
    """Reasoning before an answer, between two markers; the opening one may be there already.

    `again`: it may begin anywhere, and more than once.
    """

    open: str
    close: str
    begun: bool
    again: bool = False


@dataclass(frozen=True, slots=True)
class ThinkingBudget:
    """At most `num_tokens` between the markers of `thoughts`; then come the tokens `closing`, and no more thoughts."""

    num_tokens: int
    thoughts: Thoughts
    closing: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a text must look like, checked and written as llguidance reads it; None: anything.

    It says nothing of `thoughts` before the text, of which `budget` says how many there may be. `loose`: tools whose
    arguments are only sure to be an object, because their schemas cannot be obeyed.
    """

    text: str | None
    thoughts: Thoughts | None = None
    budget: ThinkingBudget | None = None
    loose: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRules:
    """Which calls an answer may make: of functions in OpenAI's form; at least one, or at most one, if that is said."""

    tools: Sequence[Mapping[str, Any]]
    required: bool = False
    single: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """The assistant's, in a conversation. It may begin with reasoning, of which structured outputs say nothing. Other
    texts are theirs from the beginning, and have no reasoning that `thinking_token_budget` could bound.

    Attributes:
        continued: what the prompt ends with where the answer goes on with a message.
        calls: None: they are not constrained.
    """

    continued: str = ""
    calls: CallRules | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens, when to stop, and what to report. Names and meanings as in vLLM.

    Raises:
        InvalidRequest: a value is outside its range; the message names the range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: all tokens
    min_p: float = 0.0
    presence_penalty: float = 0.0  # over generated tokens
    frequency_penalty: float = 0.0  # over generated tokens
    repetition_penalty: float = 1.0  # over prompt and generated tokens
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: as many as the context has room for
    min_tokens: int = 0
    logprobs: int | None = None  # -1: the whole vocabulary, where the engine allows it
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    skip_reading_prefix_cache: bool | None = None  # None: only when prompt_logprobs is asked for
    structured_outputs: StructuredOutputsParams | None = None
    thinking_token_budget: int | None = None  # tokens of reasoning before it is closed; -1: any number
    output_kind: OutputKind = OutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        self._normalise()
        self._check_numbers()
        self._check_tokens()
        self._check_stops()

    def _normalise(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        if isinstance(self.stop, str):
            put("stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "bad_words"):
            put(name, tuple(getattr(self, name) or ()))
        if self.allowed_token_ids is not None:
            put("allowed_token_ids", tuple(self.allowed_token_ids))
        for name in ("seed", "thinking_token_budget"):
            if getattr(self, name) == -1:
                put(name, None)
        if self.logprobs is True:
            put("logprobs", 1)
        if _is_number(self.temperature) and GREEDY_BELOW <= self.temperature < LOWEST_TEMPERATURE:
            put("temperature", LOWEST_TEMPERATURE)
        if self.skip_reading_prefix_cache is None:
            put("skip_reading_prefix_cache", self.prompt_logprobs is not None)

    def _check_numbers(self) -> None:
        def number(name: str, low: float, high: float, rule: str, *, open_low: bool = False) -> None:
            value = getattr(self, name)
            ok = _is_number(value) and (low < value if open_low else low <= value) and value <= high
            _check(ok, name, value, rule)

        def whole(name: str, low: int, high: float, rule: str) -> None:
            value = getattr(self, name)
            _check(_is_int(value) and low <= value <= high, name, value, rule)

        whole("n", 1, MAX_N, f"an integer from 1 to {MAX_N}")
        number("temperature", 0, 2, "a number from 0 to 2")
        number("top_p", 0, 1, "a number above 0 and at most 1", open_low=True)
        whole("top_k", -1, math.inf, "-1 or 0 (off) or a positive integer")
        number("min_p", 0, 1, "a number from 0 to 1")
        number("presence_penalty", -2, 2, "a number from -2 to 2")
        number("frequency_penalty", -2, 2, "a number from -2 to 2")
        number("repetition_penalty", 0, math.inf, "a finite number above 0", open_low=True)
        if self.seed is not None:
            whole("seed", -(2**63), 2**63 - 1, "an integer of 64 bits")
        if self.max_tokens is not None:
            whole("max_tokens", 1, math.inf, "at least 1, or None for all the context allows")
        whole("min_tokens", 0, math.inf, "at least 0")
        if self.thinking_token_budget is not None:
            whole("thinking_token_budget", 0, 2**63 - 1, "-1 (no budget) or an integer from 0 to 2**63 - 1")
        _check(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            self.min_tokens,
            f"at most max_tokens, which is {self.max_tokens}",
        )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                whole(name, -1, math.inf, "-1 (the whole vocabulary) or at least 0")
        greedy_many = self.n > 1 and self.is_greedy
        _check(not greedy_many, "n", self.n, "1 when temperature is 0: all outputs would be equal")

    def _check_tokens(self) -> None:
        for name in ("stop_token_ids", "allowed_token_ids"):
            for token in getattr(self, name) or ():
                _check(_is_int(token) and token >= 0, name, token, "a list of token ids (integers >= 0)")
        _check(
            self.allowed_token_ids is None or len(self.allowed_token_ids) > 0,
            "allowed_token_ids",
            self.allowed_token_ids,
            "None or a list with at least one token id",
        )
        bias = self.logit_bias or {}
        _check(
            len(bias) <= MAX_BIASED_TOKENS,
            "logit_bias",
            f"{len(bias)} entries",
            f"at most {MAX_BIASED_TOKENS}",
        )
        for token, value in bias.items():
            _check(
                _is_int(token) and token >= 0, "logit_bias", token, "a mapping from token ids (integers >= 0)"
            )
            _check(_is_number(value) and -100 <= value <= 100, "logit_bias", value, "from -100 to 100")

    def _check_stops(self) -> None:
        limits = (("stop", MAX_STOP_STRINGS), ("bad_words", MAX_BAD_WORDS))
        for name, limit in limits:
            words = getattr(self, name)
            _check(len(words) <= limit, name, f"{len(words)} strings", f"at most {limit} strings")
            for word in words:
                ok = isinstance(word, str) and 0 < len(word) <= MAX_STOP_CHARS
                _check(ok, name, word, f"non-empty strings of at most {MAX_STOP_CHARS} characters")
        _check(self.detokenize or not self.stop, "stop", self.stop, "empty when detokenize is False")
        _check(isinstance(self.output_kind, OutputKind), "output_kind", self.output_kind, "an OutputKind")
        given = self.structured_outputs
        known = given is None or isinstance(given, StructuredOutputsParams)
        _check(known, "structured_outputs", given, "StructuredOutputsParams")
        ends = given is None or not self.ignore_eos
        _check(
            ends, "ignore_eos", True, "off with structured_outputs, whose text ends with the model's own end"
        )

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """Beam search: keep `beam_width` sequences by cumulative log probability / length ** length_penalty."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        _check(
            _is_int(self.beam_width) and 1 <= self.beam_width <= 256,
            "beam_width",
            self.beam_width,
            "1 to 256",
        )
        _check(_is_int(self.max_tokens) and self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _check(_is_number(self.length_penalty), "length_penalty", self.length_penalty, "a finite number")


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt as token ids; `prompt` is only echoed."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]
    positions: NotRequired[Sequence[Sequence[int]]]  # in time, height and width, one of each for each token


Prompt = str | list[int] | TextPrompt | TokensPrompt


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's natural log probability under the model, before penalties and temperature.

    `rank` counts from 1, the most likely token.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one position: the token that is there, then the most likely ones, best first."""

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]  # from 1


@dataclass(frozen=True, slots=True)
class CacheMisses:
    """Prompt tokens that were not found in the prefix cache, by the reason."""

    new: int = 0  # nobody is known to have computed them: the text differs from what is kept
    evicted: int = 0  # their block, or what comes before it, was there and had to make room
    unfinished: int = 0  # another sequence was computing them, and could not be waited for
    stateless: int = 0  # keys and values were there, but no state of recurrent layers to go on from
    tail: int = 0  # they fill no block, or share one with the last token, which is always computed
    unread: int = 0  # the request does not read the cache, or it is off

    def __add__(self, other: "CacheMisses") -> "CacheMisses":
        return CacheMisses(*[getattr(self, name) + getattr(other, name) for name in MISS_REASONS])

    def by_reason(self) -> dict[str, int]:
        """Without the reasons that did not occur."""
        return {name: num for name in MISS_REASONS if (num := getattr(self, name))}


MISS_REASONS = tuple(each.name for each in fields(CacheMisses))


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Where a prompt's tokens are in time, height and width, which rotary embedding turns them by.

    What follows is one after another from beyond the greatest of them, in all three: `offset` from its number.
    """

    rows: tuple[tuple[int, ...], ...]
    offset: int

    @classmethod
    def of(cls, rows: Iterable[Iterable[int]]) -> "Coordinates":
        """With what follows; rows of one length, not empty."""
        found = tuple(map(tuple, rows))
        return cls(found, max(map(max, found)) + 1 - len(found[0]))

    def between(self, first: int, last: int) -> tuple[tuple[int, ...], ...]:
        """Of tokens `first` to `last` - 1, whether the prompt's or not."""
        after = range(max(first, len(self.rows[0])) + self.offset, last + self.offset)
        return tuple((*row[first:last], *after) for row in self.rows)

    def up_to(self, num_tokens: int) -> "Coordinates":
        """Those of the prompt and what follows as one prompt of so many tokens."""
        return Coordinates(self.between(0, num_tokens), self.offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the engine runs: one prompt as token ids, `params.n` sequences."""

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    prompt: str | None = None
    priority: int = 0  # lower runs first
    tenant: str = ""  # shares the machine fairly with other tenants
    cache_salt: str = ""  # requests with different salts never share cached blocks
    arrival_s: float = 0.0
    outputs: tuple[
        tuple[int, ...], ...
    ] = ()  # tokens of each sequence, of a request that another engine began
    ended: frozenset[int] = frozenset()  # which of those are complete
    num_cached_tokens: int = 0  # of the prompt, as that engine found it
    cache_misses: CacheMisses = CacheMisses()  # the prompt's other tokens
    marks: Mapping[int, str] | None = None  # characters that stand for special tokens in the text
    coordinates: Coordinates | None = None  # None: tokens are one after another
    grammar: Grammar | None = None  # of params.structured_outputs
    spans: tuple[
        tuple[int, int], ...
    ] = ()  # from and up to which of the prompt's tokens these see each other


@dataclass(slots=True)
class RequestMetrics:
    """Times are seconds on the engine's monotonic clock."""

    arrival_s: float = 0.0
    scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    num_preemptions: int = 0
    num_generated_tokens: int = 0  # of all sequences
    num_replays: int = 0  # times that it went on in a new engine, after one was lost


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's `n` sequences."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None  # a dict per token; the sampled token first
    finish_reason: str | None = None  # a FinishReason's value
    stop_reason: int | str | None = None  # the stop string or token id; None for end of sequence

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """What is known about a request so far; the last one has `finished=True`."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # None for the first token
    num_cached_tokens: int = 0
    cache_misses: CacheMisses = CacheMisses()  # the prompt's other tokens
    metrics: RequestMetrics = field(default_factory=RequestMetrics)


@dataclass(slots=True)
class BeamSearchSequence:
    """A finished or still open beam: `tokens` holds prompt and output."""

    tokens: list[int]
    cum_logprob: float
    text: str | None = None
    finish_reason: str | None = None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)


@dataclass(slots=True)
class BeamSearchOutput:
    """The best `beam_width` beams, best first."""

    sequences: list[BeamSearchSequence]
