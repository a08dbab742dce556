"""Bodies of requests, with OpenAI's names and vLLM's extras. Ranges of sampling values are `SamplingParams`' business.

None means that the request does not say: the model's own default holds.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictStr

from quire.server.asking import (
    LATER,
    Ask,
    CallAsk,
    Cap,
    Int,
    Objects,
    Off,
    On,
    Texts,
    Tokens,
    between,
    example,
)
from quire.server.errors import bad_request

Prompts = Annotated[
    StrictStr | Tokens | Texts | Annotated[list[Tokens], Field(fail_fast=True)],
    Field(union_mode="left_to_right"),
]


NO_TEMPLATES = "templates come with the model; requests cannot bring their own"
REMOVED = "it was removed from the protocol"
# Fields that change the answer and that are not there. A value that asks for nothing (None, [], False) is accepted.
REFUSED = {
    "tools": LATER,
    "tool_choice": LATER,
    "modalities": LATER,
    "web_search_options": LATER,
    "functions": "it was removed from the protocol; use tools",
    "function_call": "it was removed from the protocol; use tool_choice",
    "best_of": f"{REMOVED}; use n",
    "use_beam_search": LATER,
    "length_penalty": "it belongs to beam search, which this server cannot do yet",
    "suffix": "this model cannot fill in the middle of a text",
    "prompt_embeds": LATER,
    "logprob_token_ids": LATER,
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
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "function_call": ("none",),
    "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
    "best_of": (1,),
    "length_penalty": (1.0,),
    "truncation_side": ("right",),
}
# Fields of the protocol that change no answer here.
WITHOUT_EFFECT = {
    "guided_decoding_backend",
    "include_reasoning",
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "session_id",
    "spaces_between_special_tokens",
    "store",
    "stream_interval",
    "verbosity",
}


class StreamOptions(BaseModel):
    """What a stream has besides text."""

    include_usage: Off = Field(default=False, description="Usage in a chunk of its own at the end.")
    continuous_usage_stats: Off = Field(
        default=False, description="With include_usage: usage so far in every chunk that has a choice."
    )


class OpenAIAsk(Ask):
    """The fields of OpenAI's that are not there."""

    refused = REFUSED
    clients_fault = CLIENTS_FAULT
    neutral = NEUTRAL
    without_effect = WITHOUT_EFFECT


class SampledAsk(CallAsk):
    """How tokens are drawn, as every request for generated text may say it."""

    model_config = ConfigDict(frozen=True)

    min_p: float | None = Field(
        None,
        description="Only tokens at least so likely, as a share of the likeliest one.",
        json_schema_extra=between(0, 1),
    )
    presence_penalty: float | None = Field(
        None, description="Against tokens that were generated before.", json_schema_extra=between(-2, 2)
    )
    frequency_penalty: float | None = Field(
        None, description="As above, for each time that they were.", json_schema_extra=between(-2, 2)
    )
    repetition_penalty: float | None = Field(
        None,
        description="Divides scores of tokens of prompt and output; 1: off.",
        json_schema_extra=between(0),
    )
    seed: int | None = Field(None, description="The same seed, the same text.")
    stop: StrictStr | Texts | None = Field(None, description="Up to 16 strings that end the text.")
    thinking_token_budget: Int | None = Field(
        None,
        description="Tokens of reasoning before it is closed; -1: any number.",
        json_schema_extra=between(-1),
    )


class GenerationRequest(SampledAsk, OpenAIAsk):
    """What requests for completions, of prompts or of chats, may say."""

    model_config = ConfigDict(frozen=True)

    n: Int | None = Field(None, description="Outputs for each prompt.", json_schema_extra=between(1))
    stop_token_ids: Tokens | None = Field(None, description="Tokens that end the text.")
    include_stop_str_in_output: bool | None = Field(None, description="Keep the stop string in the text.")
    ignore_eos: bool | None = Field(None, description="Go on after the model's own end.")
    max_tokens: Cap | None = Field(
        None, description="A cap; the context's room holds as well.", json_schema_extra=between(0)
    )
    min_tokens: Int | None = Field(
        None, description="No end before so many tokens.", json_schema_extra=between(0)
    )
    logit_bias: dict[int, float] | None = Field(
        None, description="Token id to what is added to its score, -100 to 100; up to 1,024."
    )
    allowed_token_ids: Tokens | None = Field(None, description="Only these tokens.")
    bad_words: Texts | None = Field(None, description="Words that are never written; up to 128.")
    skip_special_tokens: bool | None = Field(None, description="Leave special tokens out of the text.")
    prompt_logprobs: Int | None = Field(
        None, description="Log probabilities of the prompt's tokens; not in streams."
    )
    stream: Off = Field(False, description="Server-sent events, ended by data: [DONE].")
    stream_options: StreamOptions | None = None
    echo: Off = Field(False, description="Begin with the prompt, or with the message that is continued.")
    return_token_ids: Off = Field(False, description="Token ids of prompt and text too.")
    return_tokens_as_token_ids: Off = Field(
        False, description="Tokens of log probabilities as token_id:7 instead of text."
    )
    response_format: dict[str, Any] | None = Field(
        None, description="text, json_object, json_schema (always strict) or structural_tag."
    )
    structured_outputs: dict[str, Any] | None = Field(
        None,
        description="One of json, regex, choice, grammar, json_object, structural_tag; docs/server.md says more.",
    )
    guided_json: StrictStr | dict[str, Any] | None = Field(None, description="As structured_outputs.json.")
    guided_regex: StrictStr | None = Field(None, description="As structured_outputs.regex.")
    guided_choice: Texts | None = Field(None, description="As structured_outputs.choice.")
    guided_grammar: StrictStr | None = Field(None, description="As structured_outputs.grammar.")
    guided_json_object: bool | None = Field(None, description="As structured_outputs.json_object.")
    guided_whitespace_pattern: StrictStr | None = Field(
        None, description="As structured_outputs.whitespace_pattern."
    )
    user: str | None = None

    def check(self) -> list[str]:
        """Refuse what cannot be done; returns a warning for each field that is not known.

        Raises:
            ApiError: names the field.
        """
        warnings = super().check()
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

    model_config = example(prompt="Once upon a time", max_tokens=20, temperature=0)

    prompt: Prompts = Field(description="Text or token ids, one prompt or up to 2,048.")
    logprobs: Int | None = Field(
        None, description="Log probabilities: how many tokens at each position; -1: all."
    )
    add_special_tokens: On = Field(True, description="Begin as the tokenizer does, such as with <s>.")


class ChatRequest(GenerationRequest):
    """The body of /v1/chat/completions."""

    model_config = example(messages=[{"role": "user", "content": "What is the capital of France?"}])

    messages: Objects = Field(description="The conversation: role and content, by the model's own template.")
    max_completion_tokens: Cap | None = Field(
        None, description="As max_tokens, before which it goes.", json_schema_extra=between(1)
    )
    logprobs: Off = Field(False, description="Log probabilities of the tokens.")
    top_logprobs: Int | None = Field(
        None, description="With logprobs: how many tokens at each position.", json_schema_extra=between(-1)
    )
    tools: Objects | None = Field(None, description="Functions that the model may call.")
    tool_choice: StrictStr | dict[str, Any] | None = Field(
        None,
        description="auto, required, a function, allowed_tools; or none: the model is told of no tools.",
    )
    parallel_tool_calls: On = Field(True, description="Off: at most one call.")
    include_reasoning: On = Field(True, description="Off: reasoning is left out.")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="Sets the template's enable_thinking and thinking, true unless it is none."
    )
    documents: Objects | None = Field(None, description="For templates that take documents.")
    add_generation_prompt: bool | None = Field(
        None, description="Begin an answer; without it: unless continue_final_message."
    )
    continue_final_message: Off = Field(False, description="Go on with the last message.")
    add_special_tokens: Off = Field(False, description="In addition to those that the template writes.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="More names for the template.")


class TokenizeRequest(OpenAIAsk):
    """The body of /tokenize: a text, or a conversation."""

    model_config = example(prompt="Once upon a time")

    prompt: StrictStr | None = None
    messages: Objects | None = None
    tools: Objects | None = None
    add_special_tokens: bool | None = Field(
        None, description="Without it: for a text, and not for a conversation."
    )
    add_generation_prompt: bool | None = None
    continue_final_message: Off = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: Off = Field(False, description="Each token as the vocabulary writes it, too.")


class DetokenizeRequest(OpenAIAsk):
    """The body of /detokenize."""

    model_config = example(tokens=[1, 2])

    tokens: Tokens
