"""What passes between the half of the engine that knows text and the half that knows the device."""

from dataclasses import dataclass

import msgspec

from quire.types import CacheMisses, Coordinates, Grammar, SamplingParams, TokenLogprobs


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
    share: float = 1.0  # of the machine that the tenant gets, relative to other tenants
    cache_salt: str = ""
    label: str = ""  # what its user calls it; nothing depends on it
    outputs: tuple[tuple[int, ...] | None, ...] = ()
    coordinates: Coordinates | None = None
    spans: tuple[tuple[int, int], ...] = ()  # as the request's
    grammar: Grammar | None = None


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """One sequence of a request got a token, ended, or both. There is one for every token, so it is made to be cheap:
    to build, to send, and not to be looked at by the garbage collector, as nothing in it refers back.
    """

    request_id: str
    index: int  # which of the request's n sequences
    token: int | None
    logprobs: TokenLogprobs | None = None
    finish: str | None = None  # a FinishReason's value
    stop_token: int | None = None
    error: str | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None  # with the first token of index 0, if asked for
    num_cached_tokens: int = 0
    cache_misses: CacheMisses | None = None  # with a sequence's first event
    num_preemptions: int = 0
    num_replays: int = 0  # how often it went on elsewhere; whoever sends it there fills that in
    seated_s: float | None = None  # when it first took part in a step
