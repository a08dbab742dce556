"""What a router reads in a request: its prompt's pieces, its session, whether it is a stream. Knows no replica."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import msgspec
from starlette.requests import Request as HttpRequest

from quire.engine.router import chain_of
from quire.server.errors import ApiError
from quire.server.limits import check_structure

PIECE_BYTES, PIECE_TOKENS = 512, 128
BYTES_PER_TOKEN = PIECE_BYTES // PIECE_TOKENS
PROMPT = (
    "tools",
    "system",
    "instructions",
    "prompt",
    "messages",
    "input",
    "documents",
    "query",
)  # in this order
MAX_SESSION_CHARS = 256
PATHS = {  # beside those under /v1/
    *("/tokenize", "/detokenize", "/version", "/openapi.json", "/rerank", "/score", "/classify", "/pooling"),
    *("/embed", "/generate", "/v2/rerank"),
}
VOLATILE = re.compile(rb'x-anthropic-billing-header:[^"\\]*')  # see `quire.server.conversation`
PATH = re.compile(rb"/[A-Za-z0-9._~%:/-]+")
HOP = {  # headers that are about one connection
    *(
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
    ),
    *(b"trailer", b"transfer-encoding", b"upgrade"),
}
Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Ask:
    """A request as it came, and what is to be known of it."""

    method: str
    target: bytes  # path and query
    headers: Headers = field(repr=False)
    body: bytes = field(repr=False)
    fields: Mapping[str, Any] | None = field(default=None, repr=False)  # of a body that is a JSON object
    chain: list[int] = field(default_factory=list, repr=False)
    num_tokens: int = 0
    session: str = ""

    @property
    def is_stream(self) -> bool:
        return self.fields is not None and self.fields.get("stream") is True

    @property
    def path(self) -> str:
        """Without the query."""
        return self.target.partition(b"?")[0].decode("latin-1")


def read_ask(http: HttpRequest, body: bytes) -> Ask:
    """Read a request; takes a while if it is long. A body that is not understood is the replica's to refuse."""
    raw_path: bytes = http.scope["raw_path"]
    query: bytes = http.scope["query_string"]
    target = raw_path + (b"?" + query if query else b"")
    headers = passed_on(http.scope["headers"])
    fields = _fields(http, body)
    if fields is None:
        return Ask(http.method, target, headers, body)
    pieces, num_tokens = _pieces(fields)
    root = [raw_path, *(str(fields.get(name, "")) for name in ("model", "cache_salt"))]
    root += [http.headers.get(name, "") for name in ("authorization", "x-api-key")]  # tenants share no cache
    chain = chain_of(pieces, msgspec.json.encode(root))
    return Ask(http.method, target, headers, body, fields, chain, num_tokens, _session(http, fields))


def check_path(raw_path: bytes) -> None:
    """Only what is of the API is forwarded: a replica's other paths are nobody's business here.

    Raises:
        ApiError: 404
    """
    path = unquote(raw_path.decode("latin-1"))
    known = path.startswith("/v1/") or path in PATHS
    if not known or not PATH.fullmatch(raw_path) or ".." in path or "//" in path or "\\" in path:
        raise ApiError(404, "there is no such path")


def passed_on(headers: Headers) -> Headers:
    """Without those that are about one connection, also by what `Connection` names."""
    named = {
        word.strip().lower()
        for name, value in headers
        if name.lower() == b"connection"
        for word in value.split(b",")
    }
    return [(name, value) for name, value in headers if name.lower() not in HOP | named]


def _fields(http: HttpRequest, body: bytes) -> dict[str, Any] | None:
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if http.method != "POST" or kind != "application/json" or "content-encoding" in http.headers:
        return None
    try:
        check_structure(body)
        found = msgspec.json.decode(body)
    except (ApiError, msgspec.MsgspecError, RecursionError, UnicodeError):
        return None
    return found if isinstance(found, dict) else None


def _pieces(fields: Mapping[str, Any]) -> tuple[list[bytes], int]:
    """The full pieces of a prompt, and about how many tokens it has."""
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        ids = [prompt[at : at + PIECE_TOKENS] for at in range(0, len(prompt), PIECE_TOKENS)]
        return [msgspec.json.encode(piece) for piece in ids if len(piece) == PIECE_TOKENS], len(prompt)
    text = msgspec.json.encode([fields[name] for name in PROMPT if name in fields]).rstrip(b'"]}')
    text = VOLATILE.sub(b"", text, count=1)
    ends = range(PIECE_BYTES, len(text) + 1, PIECE_BYTES)
    return [text[end - PIECE_BYTES : end] for end in ends], -(-len(text) // BYTES_PER_TOKEN)


def _session(http: HttpRequest, fields: Mapping[str, Any]) -> str:
    for found in (http.headers.get("x-session-id"), fields.get("user"), fields.get("prompt_cache_key")):
        if isinstance(found, str) and found:
            return found[:MAX_SESSION_CHARS]
    return ""
