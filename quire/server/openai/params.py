"""From a request's fields to `SamplingParams`, and from outputs to what all answers share. Knows no route."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from quire import __version__
from quire.server.call import Call
from quire.server.errors import ApiError, bad_request
from quire.server.openai.protocol import ChatRequest, CompletionRequest, GenerationRequest, SampledAsk
from quire.server.openai.requests import ResponsesRequest
from quire.server.openai.structured import form_of, structured
from quire.server.sse import event
from quire.types import (
    CacheMisses,
    Logprob,
    OutputKind,
    RequestOutput,
    SamplingParams,
    StructuredOutputsParams,
)

FINGERPRINT = f"quire-{__version__}"
LOWEST = -9999.0  # JSON has no infinity
SAME = SamplingParams.__dataclass_fields__.keys() - {"max_tokens", "logprobs", "structured_outputs"}


def sampling_params(
    ask: SampledAsk,
    defaults: Mapping[str, Any],
    *,
    max_tokens: int | None,
    logprobs: int | None = None,
    form: StructuredOutputsParams | None,
    streams: bool = False,
) -> SamplingParams:
    """The model's defaults, and over them what the request says.

    Raises:
        InvalidRequest, ApiError: a value is outside its range.
    """
    names = SAME & type(ask).model_fields.keys()
    given = {name: value for name in sorted(names) if (value := getattr(ask, name)) is not None}
    own = {
        "max_tokens": max_tokens,
        "logprobs": logprobs,
        "structured_outputs": form,
        "output_kind": OutputKind.DELTA if streams or ask.stream else OutputKind.FINAL_ONLY,
    }
    return SamplingParams(**{**defaults, **given, **own})


def check_n(ask: GenerationRequest, most: int) -> None:
    """Raises ApiError: more outputs are asked for than the server allows."""
    if ask.n is not None and ask.n > most:
        raise bad_request(f"n is {ask.n}; this server allows at most {most}", "n")


def completion_params(ask: CompletionRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    """As OpenAI's: 16 tokens unless the request says more. A prompt that is only echoed computes one."""
    max_tokens = 16 if ask.max_tokens is None else ask.max_tokens
    if max_tokens == 0 and ask.echo:
        max_tokens = 1
    if ask.echo and ask.logprobs is not None and ask.prompt_logprobs is None:
        ask = ask.model_copy(update={"prompt_logprobs": ask.logprobs})
    form = structured(ask)
    return sampling_params(ask, defaults, max_tokens=max_tokens, logprobs=ask.logprobs, form=form)


def chat_params(ask: ChatRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    """All that the context has room for, unless the request or the model says less."""
    asked = ask.max_tokens if ask.max_completion_tokens is None else ask.max_completion_tokens
    most = defaults.get("max_tokens") if asked is None else asked
    logprobs = (ask.top_logprobs or 0) if ask.logprobs else None
    return sampling_params(ask, defaults, max_tokens=most, logprobs=logprobs, form=structured(ask))


def response_params(ask: ResponsesRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    """As of a chat completion."""
    most = defaults.get("max_tokens") if ask.max_output_tokens is None else ask.max_output_tokens
    given = (ask.text or {}).get("format") or {"type": "text"}
    if not isinstance(given, Mapping):
        raise bad_request(f"text.format is {str(given)[:100]!r}; it must be an object", "text.format")
    fields = form_of(given, "text.format")
    form = StructuredOutputsParams(**fields) if fields else None
    return sampling_params(ask, defaults, max_tokens=most, form=form, streams=ask.background)


def usage(
    outputs: Iterable[RequestOutput], num_generated: int, num_reasoning: int | None = None
) -> dict[str, Any]:
    """Tokens that were read, found in the cache, and written; how many of these are reasoning, if that is known."""
    outputs = list(outputs)
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    cached = sum(output.num_cached_tokens for output in outputs)
    missed = sum((output.cache_misses for output in outputs), CacheMisses()).by_reason()
    return {
        "prompt_tokens": prompt,
        "completion_tokens": num_generated,
        "total_tokens": prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": cached, "missed_tokens": missed},
        **(
            {}
            if num_reasoning is None
            else {"completion_tokens_details": {"reasoning_tokens": num_reasoning}}
        ),
    }


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST


def prompt_scores(output: RequestOutput) -> list[dict[str, Any] | None] | None:
    """`prompt_logprobs` of an answer: for each token, ids to log probability, rank and text."""
    if output.prompt_logprobs is None:
        return None
    return [None if scores is None else _scores(scores) for scores in output.prompt_logprobs]


def _scores(scores: Mapping[int, Logprob]) -> dict[str, Any]:
    return {
        str(token): {"logprob": finite(s.logprob), "rank": s.rank, "decoded_token": s.decoded_token}
        for token, s in scores.items()
    }


def envelope(call: Call, kind: str) -> dict[str, Any]:
    """What every answer and every chunk begins with."""
    return {
        "id": call.id,
        "object": kind,
        "created": call.created_s,
        "model": call.model,
        "system_fingerprint": FINGERPRINT,
    }


def ending(
    call: Call, ask: GenerationRequest, num_generated: int, num_reasoning: int | None = None
) -> dict[str, Any]:
    """What a stream's last chunk has besides the envelope; nothing if the request wants no such chunk."""
    latest, fields = call.timing.latest, dict[str, Any]()
    if latest and ask.usage_in_stream[0]:
        fields["usage"] = usage(latest.values(), num_generated, num_reasoning)
    if latest and ask.return_timing:
        fields["timing"] = call.timing.body()
    return fields


def failed(error: ApiError) -> bytes:
    """The event of a stream that breaks off."""
    return event(error.body())
