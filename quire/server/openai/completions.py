"""POST /v1/completions: prompts as text or token ids, completed."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from quire.server.call import Call, run_call
from quire.server.errors import bad_request
from quire.server.frontend import Frontend, Numbered
from quire.server.limits import MAX_PROMPTS
from quire.server.openai.logprobs import LogprobWriter
from quire.server.openai.params import (
    check_n,
    completion_params,
    ending,
    envelope,
    failed,
    prompt_scores,
    usage,
)
from quire.server.openai.protocol import CompletionRequest
from quire.server.schema import body_of
from quire.server.sse import DONE, Chunks
from quire.types import CompletionOutput, Request, RequestOutput

router = APIRouter()


@router.post("/v1/completions", openapi_extra=body_of(CompletionRequest))
async def create_completion(http: HttpRequest) -> Response:
    """Complete prompts; choice i * n + j is output j of prompt i."""
    return await run_call(http, CompletionRequest, "cmpl-", _prepare)


def _prepare(front: Frontend, call: Call, ask: CompletionRequest) -> "tuple[Writer, list[Request]]":
    check_n(ask, front.settings.max_n)
    inputs = front.service.inputs
    prompts = prompts_of(ask.prompt)
    params = completion_params(ask, inputs.defaults)
    requests = call.requests(
        front,
        prompts,
        params,
        salt=ask.cache_salt,
        add_special_tokens=ask.add_special_tokens,
        resume=ask.resume,
    )
    echoes = [""] * len(requests)
    if ask.echo and inputs.tokenizer is not None:
        texts = ((r.prompt, list(r.prompt_token_ids)) for r in requests)
        echoes = [inputs.tokenizer.decode(tokens) if text is None else text for text, tokens in texts]
    as_ids = ask.return_tokens_as_token_ids
    return Writer(call, ask, echoes, LogprobWriter(inputs.tokenizer, as_ids=as_ids)), requests


def prompts_of(given: Any) -> list[str | list[int]]:
    """One prompt or many, as text or as token ids: a list of each."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise bad_request("prompt is an empty list; it must hold at least one prompt or token id", "prompt")
    if isinstance(given[0], int):
        return [list(given)]
    if len(given) > MAX_PROMPTS:
        raise bad_request(
            f"prompt has {len(given)} prompts; at most {MAX_PROMPTS} are taken at once", "prompt"
        )
    return list(given)


class Writer:
    """Writes the outputs of one call, as one body or as chunks."""

    end, goes_on, failed = DONE, True, staticmethod(failed)

    def __init__(self, call: Call, ask: CompletionRequest, echoes: Sequence[str], logprobs: LogprobWriter):
        self.call, self.ask, self.echoes, self.logprobs = call, ask, echoes, logprobs
        self.n = ask.n or 1
        self.only_echo = ask.echo and ask.max_tokens == 0
        self.plain = ask.logprobs is None and not ask.return_token_ids
        self.num_generated = 0
        self.begun: dict[int, int] = {}  # choice -> characters that its log probabilities cover
        self.ended: set[int] = set()

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The body of an answer in one piece."""
        choices = [
            choice
            for number, output in enumerate(outputs)
            for sequence in output.outputs
            if (choice := self._choice(number, output, sequence)) is not None
        ]
        body = {**envelope(self.call, "text_completion"), "choices": choices}
        return self.call.noted({**body, "usage": usage(outputs, self.num_generated)})

    async def stream(self, outputs: AsyncGenerator[Numbered, None]) -> AsyncGenerator[bytes, None]:
        """Chunks of what is new in each output."""
        at_end, always = self.ask.usage_in_stream
        plain = envelope(self.call, "text_completion")
        first, later = Chunks(self.call.noted(plain), usage=at_end), Chunks(plain, usage=at_end)
        latest = self.call.timing.latest
        chunks = first
        async with aclosing(outputs):
            async for number, output in outputs:
                latest[number] = output
                pieces = []
                for sequence in output.outputs:
                    index = number * self.n + sequence.index
                    if self.plain and not always and index in self.begun and sequence.finish_reason is None:
                        if sequence.text:
                            pieces.append(later.text(index, sequence.text, _text_choice))
                        self.num_generated += len(sequence.token_ids)
                    elif (choice := self._choice(number, output, sequence)) is not None:
                        so_far = usage(latest.values(), self.num_generated) if always else None
                        pieces.append(chunks.choice(choice, so_far))
                        chunks = later
                if pieces:
                    yield b"".join(pieces)
        if last := ending(self.call, self.ask, self.num_generated):
            yield later.end(last)

    def _choice(self, number: int, output: RequestOutput, new: CompletionOutput) -> dict[str, Any] | None:
        """What is new of a sequence; None if nothing is."""
        index = number * self.n + new.index
        first = index not in self.begun
        if index in self.ended or not (first or new.text or new.token_ids or new.finish_reason):
            return None
        if new.finish_reason is not None:
            self.ended.add(index)
        text, tokens = ("", []) if self.only_echo else (new.text, new.token_ids)
        self.num_generated += len(tokens)
        echo = self.ask.echo and first
        choice: dict[str, Any] = {
            "index": index,
            "text": self.echoes[number] + text if echo else text,
            "logprobs": self._logprobs(index, output, new, tokens, echo=echo),
            "finish_reason": new.finish_reason,
            "stop_reason": new.stop_reason,
        }
        if self.ask.return_token_ids:
            choice["token_ids"] = tokens
            if first:
                choice["prompt_token_ids"] = output.prompt_token_ids
        if self.ask.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_scores(output)
        self.begun.setdefault(index, 0)
        return choice

    def _logprobs(
        self, index: int, output: RequestOutput, new: CompletionOutput, tokens: list[int], *, echo: bool
    ) -> dict[str, Any] | None:
        if self.ask.logprobs is None:
            return None
        rows: list[Any] = list(new.logprobs or ())[: len(tokens)]
        if echo:
            rows, tokens = [*(output.prompt_logprobs or ()), *rows], [*output.prompt_token_ids, *tokens]
        written = self.logprobs.lists(rows, tokens, self.begun.get(index, 0))
        self.begun[index] = self.begun.get(index, 0) + sum(map(len, written["tokens"]))
        return written


def _text_choice(text: str) -> dict[str, Any]:
    return {"text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}
