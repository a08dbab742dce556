"""What passes between the half of the engine that knows text and the half that knows the device."""

from dataclasses import dataclass

from quire.types import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A request without text: `params.n` sequences over one prompt."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int  # outputs that the context has room for, at most params.max_tokens
    eos_token_ids: frozenset[int] = frozenset()
    bad_words: tuple[tuple[int, ...], ...] = ()
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""


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
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None  # with a sequence's first token, if asked for
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    seated_s: float | None = None  # when it first took part in a step
