"""What the routes answer, for the OpenAPI document and for tests. Answers are not made from these."""

from typing import Any, Literal

from pydantic import BaseModel

from quire.server.openai.answers import Misses, Problem, Timing

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class MessagesUsage(BaseModel):
    """Tokens read, without those found in the cache; found there; written; and why the first were not found."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    cache_missed_input_tokens: Misses


class Block(BaseModel):
    """A part of an answer: of type text, thinking (with a signature), or tool_use (id, name, input)."""

    type: Literal["text", "thinking", "tool_use"]
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None


class Message(BaseModel):
    """The answer of /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Block]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessagesUsage
    warnings: list[str] | None = None
    timing: Timing | None = None


class MessagesEvent(BaseModel):
    """An event of a stream of /v1/messages, in the order of these types."""

    type: Literal[
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    message: Message | None = None
    index: int | None = None
    content_block: Block | None = None
    delta: dict[str, str | None] | None = None
    usage: MessagesUsage | None = None
    timing: Timing | None = None


class TokenCount(BaseModel):
    """The answer of /v1/messages/count_tokens."""

    input_tokens: int
    warnings: list[str] | None = None


class MessagesError(BaseModel):
    """Every refusal; in a stream an event like the others."""

    type: Literal["error"]
    error: Problem
