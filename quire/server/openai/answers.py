"""What the routes answer, for the OpenAPI document and for tests. Answers are not made from these: see each route.

A field without a default is always there.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]
Misses = dict[Literal["new", "evicted", "unfinished", "stateless", "tail", "unread"], int]


class CachedTokens(BaseModel):
    """Prompt tokens that did not have to be computed, and the others by why they were not found in the cache."""

    cached_tokens: int
    missed_tokens: Misses


class ReasoningTokens(BaseModel):
    """Tokens of the output that are reasoning."""

    reasoning_tokens: int


class Usage(BaseModel):
    """Tokens read and written; of all prompts and outputs of a call."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens | None = None


class TokenScore(BaseModel):
    """A token of the vocabulary at one position. `bytes` is null where there is no tokenizer."""

    token: str
    logprob: float
    bytes: list[int] | None


class Position(TokenScore):
    """The token that was chosen, and the likeliest ones."""

    top_logprobs: list[TokenScore]


class ChatLogprobs(BaseModel):
    """Log probabilities of a chat's tokens."""

    content: list[Position]


class PromptScore(BaseModel):
    """One token at one position of the prompt; rank 1 is the likeliest."""

    logprob: float
    rank: int | None
    decoded_token: str | None


PromptScores = list[dict[str, PromptScore] | None]  # token id to score; none for the first token


class CompletionLogprobs(BaseModel):
    """Log probabilities of a text's tokens, as parallel lists. With echo the prompt's first token has none."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class Envelope(BaseModel):
    """What every answer and every chunk has."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    warnings: list[str] | None = None


class Timing(BaseModel):
    """How long the parts of a call took; those that did not happen are not there."""

    queue_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None
    total_s: float
    tokens_per_second: float | None
    cached_tokens: int
    num_preemptions: int
    num_replays: int


class CalledFunction(BaseModel):
    """A function and its arguments as JSON; in a stream the name comes first, then pieces of the arguments."""

    name: str | None = None
    arguments: str


class Called(BaseModel):
    """A call of a tool; in a stream what is new of it, and `index` says of which."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class ChatMessage(BaseModel):
    """What the model answers. `reasoning` has two names because clients read one or the other."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Called] | None = None


class ChatChoice(BaseModel):
    """One of the n answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatAnswer(Envelope):
    """The answer of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    timing: Timing | None = None
    prompt_logprobs: PromptScores | None = None
    prompt_token_ids: list[int] | None = None


class ChatDelta(BaseModel):
    """What is new of a message; the role comes first."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Called] | None = None


class ChatChunkChoice(BaseModel):
    """What is new of one of the n answers."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatChunk(Envelope):
    """An event of a stream of /v1/chat/completions."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    timing: Timing | None = None
    prompt_token_ids: list[int] | None = None


class CompletionChoice(BaseModel):
    """Output index % n of prompt index // n; in a stream what is new of it, and a reason only at its end."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptScores | None = None


class CompletionChunk(Envelope):
    """An event of a stream of /v1/completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | None = None
    timing: Timing | None = None


class CompletionAnswer(Envelope):
    """The answer of /v1/completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage
    timing: Timing | None = None


class InputTokens(CachedTokens):
    """As of a chat completion; whatever can be kept in the cache is, and none of it has a price."""

    cache_write_tokens: Literal[0]


class ResponseUsage(BaseModel):
    """Tokens read, found in the cache, and written; how many of these are reasoning."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class ResponseAnswer(BaseModel):
    """The answer of /v1/responses. `output` has items of type message, reasoning and function_call."""

    model_config = ConfigDict(frozen=True)

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    model: str
    output: list[dict[str, Any]]
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    parallel_tool_calls: bool
    temperature: float
    top_p: float
    tool_choice: str
    tools: list[dict[str, Any]]
    reasoning: dict[str, Any]
    text: dict[str, Any]
    truncation: Literal["disabled"]
    store: bool
    background: bool
    previous_response_id: str | None
    usage: ResponseUsage | None
    warnings: list[str] | None = None
    timing: Timing | None = None


class DeletedResponse(BaseModel):
    """The answer to DELETE of /v1/responses/{response_id}."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ResponseItems(BaseModel):
    """The answer of /v1/responses/{response_id}/input_items."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ResponseEvent(BaseModel):
    """An event of a stream of /v1/responses; `type` says what else it has."""

    type: str
    sequence_number: int
    response: ResponseAnswer | None = None
    output_index: int | None = None
    content_index: int | None = None
    item_id: str | None = None
    item: dict[str, Any] | None = None
    part: dict[str, Any] | None = None
    delta: str | None = None
    text: str | None = None
    arguments: str | None = None
    logprobs: list[None] | None = None


class Model(BaseModel):
    """A name under which the model is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int
    permission: list[None]


class Models(BaseModel):
    """The answer of /v1/models."""

    object: Literal["list"]
    data: list[Model]


class TokensAnswer(BaseModel):
    """The answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None
    warnings: list[str] | None = None


class TextAnswer(BaseModel):
    """The answer of /detokenize."""

    prompt: str
    warnings: list[str] | None = None


class Version(BaseModel):
    """The answer of /version."""

    version: str


class Load(BaseModel):
    """The answer of /load: calls that wait for the engine."""

    server_load: int


class Problem(BaseModel):
    """What went wrong. `code` is the HTTP status, or a name such as `context_length_exceeded`.

    `limit` is the name of the limit that a 429 or 503 is about.
    """

    message: str
    type: str
    param: str | None
    code: int | str
    num_tokens: int | None = None
    max_model_len: int | None = None
    limit: str | None = None


class ErrorAnswer(BaseModel):
    """Every refusal; in a stream an event like the others."""

    error: Problem
