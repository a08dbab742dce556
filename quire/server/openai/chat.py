"""POST /v1/chat/completions: a conversation, answered.

`content` is the text as the model writes it: what a reasoning model thinks is part of it.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from quire.engine.inputs import InputProcessor
from quire.server.errors import bad_request
from quire.server.frontend import Frontend, Numbered
from quire.server.openai.job import Call, run_call
from quire.server.openai.logprobs import LogprobWriter
from quire.server.openai.params import chat_params, prompt_scores, usage
from quire.server.openai.protocol import ChatRequest, TokenizeRequest
from quire.server.schema import body_of
from quire.server.sse import Chunks
from quire.types import CompletionOutput, Request, RequestOutput

RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest))
async def create_chat_completion(http: HttpRequest) -> Response:
    """Answer a conversation."""
    return await run_call(http, ChatRequest, "chatcmpl-", _prepare)


def render(ask: ChatRequest | TokenizeRequest, inputs: InputProcessor, **names: Any) -> str:
    """The prompt of a conversation. `names` are the template's, unless the request has them too.

    Raises:
        ApiError, InvalidRequest: the template refuses it, or a name is not the template's to take.
    """
    kwargs = ask.chat_template_kwargs or {}
    if taken := sorted(set(kwargs) & set(RESERVED)):
        raise bad_request(
            f"chat_template_kwargs has {taken}, which are fields of the request", "chat_template_kwargs"
        )
    begin = not ask.continue_final_message if ask.add_generation_prompt is None else ask.add_generation_prompt
    return inputs.chat_prompt(
        ask.messages or (),
        None,
        add_generation_prompt=begin,
        continue_final_message=ask.continue_final_message,
        **{**names, **kwargs},
    )


def _prepare(front: Frontend, call: Call, ask: ChatRequest) -> "tuple[Writer, list[Request]]":
    if ask.top_logprobs and not ask.logprobs:
        raise bad_request("top_logprobs is set, and logprobs is not; set logprobs to true", "top_logprobs")
    inputs = front.service.inputs
    names: dict[str, Any] = {}
    if ask.documents is not None:
        names["documents"] = ask.documents
    if ask.reasoning_effort is not None:
        names |= {"reasoning_effort": ask.reasoning_effort, "enable_thinking": ask.reasoning_effort != "none"}
    prompt = render(ask, inputs, **names)
    params = chat_params(ask, inputs.defaults)
    requests = call.requests(
        front,
        [prompt],
        params,
        salt=ask.cache_salt,
        add_special_tokens=ask.add_special_tokens,
        resume=ask.resume,
    )
    as_ids = ask.return_tokens_as_token_ids
    return Writer(call, ask, LogprobWriter(inputs.tokenizer, as_ids=as_ids)), requests


class Writer:
    """Writes the outputs of one call, as one body or as chunks."""

    def __init__(self, call: Call, ask: ChatRequest, logprobs: LogprobWriter):
        self.call, self.ask, self.logprobs = call, ask, logprobs
        self.plain = not ask.logprobs and not ask.return_token_ids
        self.num_generated = 0
        self.ended: set[int] = set()
        last = ask.messages[-1] if ask.messages else {}
        own = ask.echo and last.get("role") == "assistant" and isinstance(last.get("content"), str)
        self.echo = last["content"] if own else ""

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The body of an answer in one piece."""
        (output,) = outputs
        choices = []
        for new in output.outputs:
            self.num_generated += len(new.token_ids)
            message = {"role": "assistant", "content": self.echo + new.text, "refusal": None}
            choices.append({"index": new.index, "message": message, **self._rest(new)})
        body = {**self.call.envelope("chat.completion"), "choices": choices}
        body["usage"] = usage(outputs, self.num_generated)
        if self.ask.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_scores(output)
        if self.ask.return_token_ids:
            body["prompt_token_ids"] = output.prompt_token_ids
        return self.call.noted(body)

    async def stream(self, outputs: AsyncGenerator[Numbered, None]) -> AsyncGenerator[bytes, None]:
        """Chunks of what is new in each output; the role comes first."""
        at_end, always = self.ask.usage_in_stream
        envelope = self.call.envelope("chat.completion.chunk")
        chunks, latest = Chunks(envelope, usage=at_end), self.call.timing.latest
        async with aclosing(outputs):
            async for _, output in outputs:
                pieces = []
                if not latest:
                    pieces += self._opening(output, at_end, usage([output], 0) if always else None)
                latest[0] = output
                for new in output.outputs:
                    if new.index in self.ended or not (new.token_ids or new.text or new.finish_reason):
                        continue
                    self.num_generated += len(new.token_ids)
                    if new.finish_reason is not None:
                        self.ended.add(new.index)
                    elif self.plain and not always:
                        if new.text:
                            pieces.append(chunks.text(new.index, new.text, _text_choice))
                        continue
                    choice = {"index": new.index, "delta": {"content": new.text}, **self._rest(new)}
                    so_far = usage([output], self.num_generated) if always else None
                    pieces.append(chunks.choice(choice, so_far))
                if pieces:
                    yield b"".join(pieces)
        if ending := self.call.ending(self.ask, self.num_generated):
            yield chunks.end(ending)

    def _opening(self, output: RequestOutput, at_end: bool, so_far: dict[str, Any] | None) -> list[bytes]:
        envelope = self.call.noted(self.call.envelope("chat.completion.chunk"))
        if self.ask.return_token_ids:
            envelope["prompt_token_ids"] = output.prompt_token_ids
        first, later = (
            Chunks(envelope, usage=at_end),
            Chunks(self.call.envelope("chat.completion.chunk"), usage=at_end),
        )
        delta = {"role": "assistant", "content": self.echo}
        return [
            (later if new.index else first).choice({"index": new.index, **_choice(delta)}, so_far)
            for new in output.outputs
        ]

    def _rest(self, new: CompletionOutput) -> dict[str, Any]:
        """What a choice has besides its text."""
        rest: dict[str, Any] = {
            "logprobs": None,
            "finish_reason": new.finish_reason,
            "stop_reason": new.stop_reason,
        }
        if self.ask.logprobs:
            rows, num_top = new.logprobs or [], self.ask.top_logprobs or 0
            rest["logprobs"] = self.logprobs.objects(rows, new.token_ids, num_top)
        if self.ask.return_token_ids:
            rest["token_ids"] = new.token_ids
        return rest


def _choice(delta: dict[str, Any]) -> dict[str, Any]:
    return {"delta": delta, "logprobs": None, "finish_reason": None}


def _text_choice(text: str) -> dict[str, Any]:
    return _choice({"content": text})
