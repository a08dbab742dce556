"""Bounds on what a request may be, all of them checked before anything of that size is made."""

import asyncio
import re
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from quire.server.errors import ApiError, ClientGone, bad_request

MAX_HEADER_BYTES = 64 << 10
MAX_JSON_DEPTH = 64
MAX_JSON_CONTAINERS = 200_000  # objects and lists
MAX_JSON_VALUES = 4_000_000
MAX_MESSAGES = 4_096
MAX_PROMPTS = 2_048
MAX_SEQUENCES = 2_048  # prompts * n
MAX_PROMPT_SCORES = 4_000_000  # tokens * log probabilities for each
HEAD_TIMEOUT_S = 60.0  # until a request's headers are complete
BODY_TIMEOUT_S = 60.0  # between two pieces of a body
SEND_TIMEOUT_S = 60.0  # until a client takes what was sent
LARGE_BYTES = 64 << 10  # bodies above it are read in a thread, so that streams go on meanwhile
NUM_ERRORS = 10  # of a body with many
MAX_SHOWN_CHARS = 200  # of a wrong value

Body = TypeVar("Body", bound=BaseModel)

# Possessive, and closed by the end of the text too: one pass, whatever the quotes and backslashes are.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


async def read_body(request: Request, model: type[Body], *, max_bytes: int) -> Body:
    """The JSON body of a request.

    Raises:
        ApiError: it is too large, no JSON, too deeply nested, or does not fit `model`.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise bad_request(
            f"Unsupported Media Type: content-type is {kind[:100]!r}; it must be application/json"
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise bad_request("compressed bodies are not accepted; send it without content-encoding")
    text = await read_bytes(request, max_bytes)

    def read() -> Body:
        check_structure(text)
        return parse(text, model)

    return await asyncio.to_thread(read) if len(text) > LARGE_BYTES else read()


async def read_bytes(request: Request, max_bytes: int) -> bytes:
    """The body of a request, whatever it is.

    Raises:
        ApiError: it is too large, or does not arrive.
        ClientGone: the client closed the connection.
    """
    too_large = ApiError(
        413,
        f"the body is larger than {max_bytes} bytes, this server's limit",
        headers={"Connection": "close"},
    )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > max_bytes:
        raise too_large
    body, stream = bytearray(), aiter(request.stream())
    while True:
        try:
            piece = await asyncio.wait_for(anext(stream), BODY_TIMEOUT_S)
        except StopAsyncIteration:
            return bytes(body)
        except TimeoutError:
            raise ApiError(408, "the body did not arrive", headers={"Connection": "close"}) from None
        except ClientDisconnect:
            raise ClientGone from None
        if len(body) + len(piece) > max_bytes:
            raise too_large
        body += piece


def check_structure(text: bytes) -> None:
    """Refuse JSON that is small and whose value would be huge, or that is nested too deeply.

    Raises:
        ApiError: naming the limit.
    """
    bare = _STRING.sub(b"", text)
    if bare.count(b"[") + bare.count(b"{") > MAX_JSON_CONTAINERS:
        raise bad_request(f"the body has more than {MAX_JSON_CONTAINERS} objects and lists")
    if bare.count(b",") > MAX_JSON_VALUES:
        raise bad_request(f"the body has more than {MAX_JSON_VALUES} values")
    depth = 0
    for bracket in _BRACKET.finditer(bare):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > MAX_JSON_DEPTH:
            raise bad_request(f"the body is nested more than {MAX_JSON_DEPTH} deep")


def parse(text: bytes, model: type[Body]) -> Body:
    """Raises ApiError: what is wrong, field by field."""
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        lines = [_line(item["loc"], item["msg"], item["input"]) for item in found[:NUM_ERRORS]]
        if len(found) > NUM_ERRORS:
            lines.append(f"and {len(found) - NUM_ERRORS} more")
        param = ".".join(map(str, found[0]["loc"])) or None
        raise bad_request("; ".join(lines), param) from None


def _line(where: tuple[int | str, ...], rule: str, value: object) -> str:
    if isinstance(value, bytes):  # the body itself, which is no JSON
        return rule
    shown = repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    if len(shown) > MAX_SHOWN_CHARS:
        shown = shown[:MAX_SHOWN_CHARS] + "..."
    return f"{'.'.join(map(str, where)) or 'the body'}: {rule} (it is {shown})"
