"""The body of a request for a response, with OpenAI's names and vLLM's extras."""

from typing import Any

from pydantic import ConfigDict, Field, StrictStr

from quire.server.asking import LATER, Cap, Objects, Off, On, between, example
from quire.server.openai.protocol import SampledAsk


class ResponsesRequest(SampledAsk):
    """The body of /v1/responses."""

    model_config = ConfigDict(frozen=True, **example(input="What is the capital of France?"))
    refused = {
        "conversation": "this server has no conversations; use previous_response_id",
        "prompt": "this server has no templates of prompts; use input and instructions",
        "max_tool_calls": LATER,
        "structured_outputs": LATER,
        "top_logprobs": LATER,
    }
    neutral = {
        "truncation": ("disabled",),
        "top_logprobs": (0,),
        "service_tier": ("auto", "default"),
        "stream_options": ({"include_obfuscation": False},),
    }
    without_effect = {"service_tier", "stream_options", "context_management", "truncation"}
    silent = {
        *("include", "user", "safety_identifier", "client_metadata"),
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
    }

    input: StrictStr | Objects = Field(
        description="A text, or items: messages, calls and their outputs, reasoning."
    )
    instructions: StrictStr | None = Field(None, description="The system prompt, before the input.")
    previous_response_id: StrictStr | None = Field(
        None, description="A response that was kept: its conversation comes before the input."
    )
    store: bool | None = Field(
        None, description="Keep the response; without it as the server does (--response-store-bytes)."
    )
    background: Off = Field(
        False, description="Answer at once, and go on without a client; ask for it by id."
    )
    max_output_tokens: Cap | None = Field(
        None, description="A cap; the context's room holds as well.", json_schema_extra=between(1)
    )
    tools: Objects | None = Field(None, description="Functions that the model may call.")
    tool_choice: StrictStr | dict[str, Any] | None = Field(
        None,
        description="auto, required, a function, allowed_tools; or none: the model is told of no tools.",
    )
    parallel_tool_calls: On = Field(True, description="Off: at most one call.")
    reasoning: dict[str, Any] | None = Field(
        None, description="effort: as reasoning_effort of a chat completion."
    )
    text: dict[str, Any] | None = Field(
        None, description="format: text, json_object or json_schema (always strict)."
    )
    metadata: dict[str, Any] | None = Field(None, description="Given back as it is.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="More names for the template.")
