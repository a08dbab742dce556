"""The body of a request for a response, with OpenAI's names and vLLM's extras."""

from typing import Any

from pydantic import ConfigDict, Field, StrictStr

from quire.server.asking import LATER, Cap, Objects, On, between, example
from quire.server.openai.protocol import SampledAsk

NOT_KEPT = "this server keeps no responses; send the whole conversation as input"


class ResponsesRequest(SampledAsk):
    """The body of /v1/responses."""

    model_config = ConfigDict(frozen=True, **example(input="What is the capital of France?"))
    refused = {
        "previous_response_id": NOT_KEPT,
        "conversation": NOT_KEPT,
        "background": NOT_KEPT,
        "prompt": "this server has no templates of prompts; use input and instructions",
        "max_tool_calls": LATER,
        "structured_outputs": LATER,
        "top_logprobs": LATER,
        "truncation": "prompts are never cut; send fewer tokens",
    }
    neutral = {"truncation": ("disabled",), "top_logprobs": (0,)}
    without_effect = {"service_tier", "stream_options", "context_management"}
    silent = {
        *("store", "include", "user", "safety_identifier", "client_metadata"),
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
    }

    input: StrictStr | Objects = Field(
        description="A text, or items: messages, calls and their outputs, reasoning."
    )
    instructions: StrictStr | None = Field(None, description="The system prompt, before the input.")
    max_output_tokens: Cap | None = Field(
        None, description="A cap; the context's room holds as well.", json_schema_extra=between(1)
    )
    tools: Objects | None = Field(None, description="Functions that the model may call.")
    tool_choice: StrictStr | dict[str, Any] | None = Field(
        None, description="auto, or none: the model is told of no tools."
    )
    parallel_tool_calls: On = Field(True, description="Off: calls after the first one are left out.")
    reasoning: dict[str, Any] | None = Field(
        None, description="effort: as reasoning_effort of a chat completion."
    )
    text: dict[str, Any] | None = Field(
        None, description="format: text, json_object or json_schema (always strict)."
    )
    metadata: dict[str, Any] | None = Field(None, description="Given back as it is.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="More names for the template.")
