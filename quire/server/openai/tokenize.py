"""POST /tokenize and /detokenize: text to token ids as the model reads them, and back."""

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from quire.server.errors import bad_request
from quire.server.frontend import Frontend, frontend_of, json_response
from quire.server.openai.chat import prompt_of
from quire.server.openai.protocol import DetokenizeRequest, TokenizeRequest
from quire.server.schema import body_of

router = APIRouter()


@router.post("/tokenize", openapi_extra=body_of(TokenizeRequest))
async def tokenize(http: HttpRequest) -> Response:
    """Token ids of a text, or of a conversation as the model's template writes it."""
    front = frontend_of(http)
    ask = await front.read(http, TokenizeRequest)
    front.check_model(ask.model)
    warnings = ask.unknown()
    found = await asyncio.to_thread(lambda: _tokens(ask, front))
    return json_response(_noted(found, warnings))


@router.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
async def detokenize(http: HttpRequest) -> Response:
    """The text of token ids, special tokens included."""
    front = frontend_of(http)
    ask = await front.read(http, DetokenizeRequest)
    front.check_model(ask.model)
    warnings = ask.unknown()
    text = await asyncio.to_thread(lambda: front.service.inputs.text(ask.tokens))
    return json_response(_noted({"prompt": text}, warnings))


def _noted(found: dict[str, Any], warnings: list[str]) -> dict[str, Any]:
    return {**found, "warnings": warnings} if warnings else found


def _tokens(ask: TokenizeRequest, front: Frontend) -> dict[str, Any]:
    inputs = front.service.inputs
    if (ask.prompt is None) == (ask.messages is None):
        raise bad_request("give either prompt or messages", "prompt")
    text = ask.prompt if ask.prompt is not None else prompt_of(ask, front, ask.tools or None)
    special = ask.messages is None if ask.add_special_tokens is None else ask.add_special_tokens
    tokens = inputs.tokens(text, add_special_tokens=special)
    found: dict[str, Any] = {"count": len(tokens), "max_model_len": inputs.max_length, "tokens": tokens}
    if ask.return_token_strs and inputs.tokenizer is not None:
        found["token_strs"] = [inputs.tokenizer.token(token) for token in tokens]
    return found
