"""Bodies of requests, with Anthropic's names. Blocks are read in `blocks.py`."""

from typing import Any

from pydantic import Field, StrictStr

from quire.server.asking import LATER, Ask, CallAsk, Cap, Objects, Texts, between, example


class CountTokensRequest(Ask):
    """The body of /v1/messages/count_tokens."""

    model_config = example(messages=[{"role": "user", "content": "What is the capital of France?"}])
    refused = {"mcp_servers": LATER, "container": LATER}
    without_effect = {"service_tier", "context_management", "inference_geo"}
    silent = {"metadata"}

    messages: Objects = Field(description="The conversation: role and content, a text or blocks.")
    system: StrictStr | Objects | None = Field(None, description="A text, or blocks of text.")
    tools: Objects | None = Field(None, description="Functions that the model may call.")
    tool_choice: dict[str, Any] | None = Field(
        None, description="Of type auto, any, tool; or none: the model is told of no tools."
    )
    thinking: dict[str, Any] | None = Field(
        None, description="Sets the template's enable_thinking and thinking; without it the template decides."
    )
    output_config: dict[str, Any] | None = Field(
        None,
        description="effort: goes to the template as reasoning_effort; format: the JSON schema of the text.",
    )
    output_format: dict[str, Any] | None = Field(None, description="As output_config.format.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="More names for the template.")


class MessagesRequest(CallAsk, CountTokensRequest):
    """The body of /v1/messages."""

    model_config = example(
        max_tokens=64, messages=[{"role": "user", "content": "What is the capital of France?"}]
    )

    max_tokens: Cap = Field(
        description="A cap; the context's room holds as well.", json_schema_extra=between(1)
    )
    stop_sequences: Texts | None = Field(None, description="Up to 16 strings that end the answer.")
