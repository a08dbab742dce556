"""What passes between the half of the engine that knows text and the half that knows the device."""

from dataclasses import dataclass

from quire.types import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A request without text: `params.n` sequences over one prompt.

    One that was interrupted goes on with `outputs`: by index the tokens that a sequence has, or None if it has ended.
    With an int as `params.seed` it gets the tokens that it would have got. Empty: all sequences start afresh.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int  # outputs that the context has room for, at most params.max_tokens
    eos_token_ids: frozenset[int] = frozenset()
    bad_words: tuple[tuple[int, ...], ...] = ()
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    outputs: tuple[tuple[int, ...] | None, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """One sequence of a request got a token, ended, or both."""

    request_id: str
    index: int  # which of the request's n sequences
    token: int | None
    logprobs: TokenLogprobs | None = None
    finish: str | None = None  # a FinishReason's value
    stop_token: int | None = None
    error: str | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None  # with the first token of index 0, if asked for
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    seated_s: float | None = None  # when it first took part in a step
