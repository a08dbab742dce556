"""Streams that can go on at another server. Knows no protocol and no engine.

A router that asks for it is told which tokens are behind each piece of a stream, in a comment that ends the piece. If
the stream breaks off, it sends the same request elsewhere, with the tokens that it was told of as `resume`: what those
make is not sent again, and the rest follows.
"""

import dataclasses
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Self

import msgspec
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from quire.engine.inputs import InputProcessor
from quire.engine.outputs import RequestState
from quire.server.errors import bad_request
from quire.server.frontend import Numbered
from quire.types import CacheMisses, Request, RequestOutput

ASKED = "x-engine-resumable"  # a header: of a request, that tokens are wanted; of an answer, that they come
COMMENT = b": tokens "
MOST = (1 << 31) - 1

Pieces = Callable[[AsyncGenerator[Numbered, None]], AsyncGenerator[bytes, None]]
Begun = list[tuple[int, RequestOutput]]
LookedUpPrompt = tuple[int, int, dict[str, int]]  # its number, tokens that were cached, others by the reason


class Had(BaseModel):
    """A choice that has begun."""

    model_config = ConfigDict(frozen=True)

    index: StrictInt = Field(ge=0, le=MOST)
    token_ids: Annotated[list[StrictInt], Field(fail_fast=True)]
    ended: bool = False


class LookedUp(BaseModel):
    """What was found of a prompt in the cache, as its usage says it."""

    model_config = ConfigDict(frozen=True)

    index: StrictInt = Field(ge=0, le=MOST)
    cached_tokens: StrictInt = Field(ge=0, le=MOST)
    missed_tokens: CacheMisses


class Resume(BaseModel):
    """Where a stream that broke off goes on."""

    model_config = ConfigDict(frozen=True)

    created: StrictInt = Field(0, ge=0, le=MOST, description="As the chunks so far have it.")
    choices: Annotated[list[Had], Field(fail_fast=True)] = Field(description="Those that have begun.")
    prompts: list[LookedUp] = Field([], description="Those of choices that have begun.")


class Told(msgspec.Struct, array_like=True, frozen=True):
    """What a comment says: whether all is complete with this piece, what is new of each choice, and which prompts were
    looked up.
    """

    done: bool
    choices: list[tuple[int, list[int], bool]]  # index, tokens, whether it ended
    prompts: list[LookedUpPrompt] = []

    @classmethod
    def read(cls, comment: bytes) -> Self:
        """Raises msgspec.MsgspecError: it is none."""
        return msgspec.json.decode(comment, type=cls)


def resumed(inputs: InputProcessor, requests: Sequence[Request], resume: Resume) -> list[Request]:
    """The requests of a call, with the tokens that they have.

    Raises:
        ApiError, InvalidRequest: the tokens are not those of such a call.
    """
    n = requests[0].params.n
    had = {choice.index: choice for choice in resume.choices}
    if len(had) != len(resume.choices) or any(index >= n * len(requests) for index in had):
        raise bad_request(f"resume must name choices from 0 to {n * len(requests) - 1}, each once", "resume")
    looked_up = {prompt.index: prompt for prompt in resume.prompts}
    found = []
    for number, request in enumerate(requests):
        own = [had.get(number * n + index) for index in range(n)]
        if any(choice is not None for choice in own):
            outputs = tuple(() if choice is None else tuple(choice.token_ids) for choice in own)
            ended = frozenset(
                index for index, choice in enumerate(own) if choice is not None and choice.ended
            )
            request = _with_lookup(inputs.resumed(request, outputs, ended), looked_up.get(number))
        found.append(request)
    if all(is_over(request) for request in found):
        raise bad_request("resume says that every choice has ended; there is nothing left", "resume")
    return found


def _with_lookup(request: Request, found: LookedUp | None) -> Request:
    if found is None:
        return request
    nums, num_tokens = found.missed_tokens.by_reason().values(), len(request.prompt_token_ids)
    if found.cached_tokens + sum(nums) != num_tokens or min(nums, default=0) < 0:
        raise bad_request(
            f"resume must say of all {num_tokens} tokens of prompt {found.index} how they were found",
            "resume",
        )
    return dataclasses.replace(
        request, num_cached_tokens=found.cached_tokens, cache_misses=found.missed_tokens
    )


def is_over(request: Request) -> bool:
    """Nothing of it is left to compute."""
    return len(request.ended) == request.params.n


def begun(inputs: InputProcessor, requests: Sequence[Request]) -> Begun:
    """What was sent before of requests that go on, as the engine would have put it out, with their numbers."""
    return [
        (number, RequestState(request, inputs.tokenizer).output())
        for number, request in enumerate(requests)
        if request.outputs
    ]


def going_on(write: Pieces, sent: Begun) -> Pieces:
    """`write`, for a stream that goes on: it takes in what was `sent`, and of that no piece is sent again."""

    async def pieces(outputs: AsyncGenerator[Numbered, None]) -> AsyncGenerator[bytes, None]:
        quiet = True

        async def all_outputs() -> AsyncGenerator[Numbered, None]:
            nonlocal quiet
            for number, output in sent:
                yield number, output
            async with aclosing(outputs):
                async for number, output in outputs:
                    quiet = False
                    yield number, output

        async with aclosing(write(all_outputs())) as written:
            async for piece in written:
                if not quiet:
                    yield piece

    return pieces


def told(write: Pieces, n: int, num_open: int) -> Pieces:
    """`write`, with a comment behind each piece about the tokens that made it. `num_open`: requests that will end."""

    async def pieces(outputs: AsyncGenerator[Numbered, None]) -> AsyncGenerator[bytes, None]:
        news: dict[int, tuple[list[int], bool]] = {}
        known: set[int] = set()  # choices that have begun
        prompts: list[LookedUpPrompt] = []  # and what was not told yet
        looked_up: set[int] = set()
        left = num_open

        async def noted() -> AsyncGenerator[Numbered, None]:
            nonlocal left
            async with aclosing(outputs):
                async for number, output in outputs:
                    left -= output.finished
                    if number not in looked_up and (
                        output.num_cached_tokens or output.cache_misses.by_reason()
                    ):
                        looked_up.add(number)
                        prompts.append((number, output.num_cached_tokens, output.cache_misses.by_reason()))
                    for new in output.outputs:
                        index, over = number * n + new.index, new.finish_reason is not None
                        if new.token_ids or over or index not in known:
                            tokens, _ = news.get(index, ([], False))
                            news[index] = ([*tokens, *new.token_ids], over)
                            known.add(index)
                    yield number, output

        async with aclosing(write(noted())) as written:
            async for piece in written:
                if news:
                    piece += _comment(not left, news, prompts)
                    news, prompts = {}, []
                yield piece

    return pieces


def numbered(write: Pieces, numbers: Sequence[int]) -> Pieces:
    """`write`, for outputs of the call's requests with these numbers alone."""

    async def outer(outputs: AsyncGenerator[Numbered, None]) -> AsyncGenerator[Numbered, None]:
        async with aclosing(outputs):
            async for place, output in outputs:
                yield numbers[place], output

    return lambda outputs: write(outer(outputs))


def _comment(done: bool, news: Mapping[int, tuple[list[int], bool]], prompts: list[LookedUpPrompt]) -> bytes:
    fields = Told(
        done,
        [(index, tokens, ended) for index, (tokens, ended) in news.items()],
        prompts,
    )
    return COMMENT + msgspec.json.encode(fields) + b"\n\n"
