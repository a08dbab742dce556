"""Bodies of requests, with OpenAI's names and vLLM's extras. Ranges of sampling values are `SamplingParams`' business.

None means that the request does not say: the model's own default holds.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from quire.server.errors import bad_request, not_supported
from quire.server.limits import MAX_MESSAGES

# Lists stop at their first mistake, so that a million wrong items do not make a million messages.
Int = Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]
Texts = Annotated[list[StrictStr], Field(fail_fast=True)]
Tokens = Annotated[list[StrictInt], Field(fail_fast=True)]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=MAX_MESSAGES)]
Prompts = Annotated[
    StrictStr | Tokens | Texts | Annotated[list[Tokens], Field(fail_fast=True)],
    Field(union_mode="left_to_right"),
]

LATER = "this server cannot do it yet"
NO_TEMPLATES = "templates come with the model; requests cannot bring their own"
REMOVED = "it was removed from the protocol"
# Fields that change the answer and that are not there. A value that asks for nothing (None, [], False) is accepted.
REFUSED = {
    "tools": LATER,
    "functions": "it was removed from the protocol; use tools",
    "function_call": "it was removed from the protocol; use tool_choice",
    "structured_outputs": LATER,
    "response_format": LATER,
    "guided_json": "it was removed; use structured_outputs",
    "guided_regex": "it was removed; use structured_outputs",
    "guided_choice": "it was removed; use structured_outputs",
    "guided_grammar": "it was removed; use structured_outputs",
    "best_of": f"{REMOVED}; use n",
    "use_beam_search": LATER,
    "length_penalty": "it belongs to beam search, which this server cannot do yet",
    "suffix": "this model cannot fill in the middle of a text",
    "prompt_embeds": LATER,
    "logprob_token_ids": LATER,
    "thinking_token_budget": LATER,
    "repetition_detection": LATER,
    "watermarking": LATER,
    "truncate_prompt_tokens": "prompts are never cut; send fewer tokens",
    "truncation_side": "prompts are never cut; send fewer tokens",
    "chat_template": NO_TEMPLATES,
    "media_io_kwargs": LATER,
    "mm_processor_kwargs": LATER,
    "audio": LATER,
    "kv_transfer_params": LATER,
    "ec_transfer_params": LATER,
    "vllm_xargs": LATER,
    "logits_processors": "code cannot be sent; use logit_bias",
}
CLIENTS_FAULT = {"best_of", "functions", "function_call", "chat_template", "logits_processors", "suffix"}
NEUTRAL = {
    "response_format": {"type": "text"},
    "function_call": "none",
    "best_of": 1,
    "length_penalty": 1.0,
    "truncation_side": "right",
}


class StreamOptions(BaseModel):
    """What a stream has besides text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(BaseModel):
    """What every request for generated text may say."""

    model_config = ConfigDict(extra="allow", frozen=True)

    model: str | None = None
    n: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: StrictStr | Texts | None = None
    stop_token_ids: Tokens | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    max_tokens: Int | None = None
    min_tokens: Int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Tokens | None = None
    bad_words: Texts | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    echo: bool = False
    priority: Int = 0
    cache_salt: str | None = None
    request_id: str | None = Field(None, pattern=r"^[A-Za-z0-9._:-]{1,128}$")
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    user: str | None = None

    def check(self) -> list[str]:
        """Refuse what cannot be done; returns a warning for each field that is not known.

        Raises:
            ApiError: names the field.
        """
        warnings = []
        for name, value in (self.model_extra or {}).items():
            if name not in REFUSED:
                warnings.append(f"{name[:100]!r} is not a known field; it had no effect")
            elif value not in (None, False, [], {}, "", NEUTRAL.get(name)):
                raise (
                    bad_request(f"{name}: {REFUSED[name]}", name)
                    if name in CLIENTS_FAULT
                    else not_supported(name, REFUSED[name])
                )
        if self.stream_options is not None and not self.stream:
            raise bad_request(
                "stream_options is set, and stream is not; set stream to true", "stream_options"
            )
        if self.prompt_logprobs is not None and self.stream:
            raise bad_request("prompt_logprobs cannot be streamed; set stream to false", "prompt_logprobs")
        return warnings

    @property
    def usage_in_stream(self) -> tuple[bool, bool]:
        """Whether usage is in a chunk at the end, and whether it is in every chunk."""
        options = self.stream_options or StreamOptions()
        return options.include_usage, options.include_usage and options.continuous_usage_stats


class CompletionRequest(GenerationRequest):
    """The body of /v1/completions."""

    prompt: Prompts
    logprobs: Int | None = None
    add_special_tokens: bool = True


class ChatRequest(GenerationRequest):
    """The body of /v1/chat/completions."""

    messages: Objects
    max_completion_tokens: Int | None = None
    logprobs: bool = False
    top_logprobs: Int | None = None
    reasoning_effort: str | None = None
    documents: Objects | None = None
    add_generation_prompt: bool | None = None  # None: unless continue_final_message
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeRequest(BaseModel):
    """The body of /tokenize: a text, or a conversation."""

    model: str | None = None
    prompt: StrictStr | None = None
    messages: Objects | None = None
    add_special_tokens: bool | None = None  # None: for a text, not for a conversation
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class DetokenizeRequest(BaseModel):
    """The body of /detokenize."""

    model: str | None = None
    tokens: Tokens
