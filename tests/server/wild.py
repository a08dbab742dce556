"""Requests as nobody would mean them: every field with values that fit it and that do not, odd heads, and raw bytes."""

import json
import math
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from quire.server.anthropic.protocol import CountTokensRequest, MessagesRequest
from quire.server.openai.protocol import (
    REFUSED,
    WITHOUT_EFFECT,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from quire.server.openai.requests import ResponsesRequest

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
JSON = "application/json"
BODIES = {
    "/v1/completions": (CompletionRequest, {"prompt": "hello", "max_tokens": 2}),
    "/v1/chat/completions": (ChatRequest, {"messages": FRANCE, "max_completion_tokens": 2}),
    "/v1/responses": (ResponsesRequest, {"input": "hello", "max_output_tokens": 2}),
    "/v1/messages": (MessagesRequest, {"messages": FRANCE, "max_tokens": 2}),
    "/v1/messages/count_tokens": (CountTokensRequest, {"messages": FRANCE}),
    "/tokenize": (TokenizeRequest, {"prompt": "hello"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [1, 2]}),
}
NUMBERS: list[Any] = [0, -1, 1, 2, 16, 2**31, 2**63, -(2**63), 10**400, 0.5, 1e-9, 1e308, math.nan, math.inf]
TEXTS: list[Any] = [
    "",
    "x",
    "\x00",
    "\ud83d",
    "é" * 300,
    "\u2028",
    "<|im_end|>",
    "{{ 7 * 7 }}",
    "data: [DONE]\n\n",
]
LISTS: list[Any] = [
    [],
    [[]],
    [[1], ["a"]],
    [4095, 4096],
    [-1],
    [True],
    [None],
    ["a", 1],
    ["hello", "there"],
    [5] * 3000,
]
OBJECTS: list[Any] = [
    *({}, {"1": 0.5}, {"-1": 1}, {"99999": 1}, {"1": 1e308}, {"role": "user"}, {"type": "text"}),
    *({"include_usage": True}, {"continuous_usage_stats": True, "include_usage": 1}),
    *({"enable_thinking": "\x00"}, {"enable_thinking": True}),
]
MESSAGES: list[Any] = [
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": 1}],
    [{"role": "tool", "tool_calls": [1]}],
    [{"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": "{"}}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}],
]
EDGES = [True, False, None, *NUMBERS, *TEXTS, *LISTS, *OBJECTS, *MESSAGES]
RARE = {
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "ignore_eos",
    "n",
}  # of which a few make a call long
SMALL = [0, -1, 1, 2, 3, 16, 17, True, "x", 1.5, [], 2**63]

values = st.sampled_from(EDGES) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    """A path, and a body that is near what it takes."""
    path = draw(st.sampled_from(sorted(BODIES)))
    model, body = BODIES[path]
    names = st.sampled_from([*model.model_fields, *sorted(REFUSED), *sorted(WITHOUT_EFFECT), "unknown"])
    chosen = draw(st.lists(names, max_size=4, unique=True))
    changed = {name: draw(st.sampled_from(SMALL) if name in RARE else values) for name in chosen}
    if draw(st.integers(0, 3)) == 0 and "stream" in model.model_fields:
        changed["stream"] = True
    text = json.dumps({**body, **changed})
    cut = draw(st.none() | st.integers(0, len(text))) if draw(st.integers(0, 9)) == 0 else None
    return path, text[:cut].encode()


@dataclass(frozen=True)
class Wild:
    """A request as bytes. `whole`: the server must answer it."""

    data: bytes
    whole: bool = True


header_text = st.text(
    st.characters(min_codepoint=1, max_codepoint=255, exclude_characters="\r\n"), max_size=30
)
HEADERS = {
    "Authorization": ["Bearer x", "Basic eA==", "Bearer", ""],
    "X-Request-Id": ["a-b", "a b", "x" * 500, "<script>", ""],
    "X-Vllm-Priority": ["3", "-3", "--3", "9" * 30, "x"],
    "X-Request-Timeout": ["5", "0", "-1", "nan", "inf", "1e9", "x"],
    "Content-Encoding": ["identity", "gzip", "br"],
    "Accept": ["*/*", "text/event-stream", "image/png"],
    "Expect": ["100-continue", "x"],
    "Upgrade": ["websocket", "h2c"],
    "Origin": ["https://example.org"],
    "Range": ["bytes=0-1"],
    "Traceparent": ["00-" + "a" * 32 + "-" + "b" * 16 + "-01", "x"],
    "X-Forwarded-For": ["127.0.0.1", "x"],
    "Cookie": ["a=b"],
    "Te": ["trailers"],
}
KINDS = [
    JSON,
    JSON,
    JSON,
    JSON + "; charset=utf-8",
    JSON.upper(),
    "text/plain",
    "multipart/form-data",
    "",
    "*/*",
]
METHODS = ["GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "PROPFIND"]
PATHS = [
    *BODIES,
    *(
        "/",
        "//",
        "/v1",
        "/v1/",
        "/v1/models",
        "/v1/models/",
        "/v1/models/demo",
        "/v1/models/%00",
        "/v1/models/a/b",
    ),
    *("/health", "/ping", "/livez", "/readyz", "/startupz", "/version", "/load", "/metrics", "/openapi.json"),
    *(
        "/docs",
        "/admin",
        "/requests",
        "/v1/../livez",
        "/%2e%2e/etc/passwd",
        "/v1/embeddings",
        "/ping?x=%ff",
        "/?",
    ),
    *("/v1/completions/", "/V1/completions", "/tokenize%00", "/livez;a", "http://x/livez", "/" + "a" * 3000),
]


def written(method: str, target: str, headers: list[tuple[str, str]], body: bytes = b"") -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: test", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body


@st.composite
def posted(draw: st.DrawFn) -> Wild:
    path, body = draw(bodies())
    headers = [("Content-Type", draw(st.sampled_from(KINDS)) if draw(st.integers(0, 9)) == 0 else JSON)]
    if draw(st.integers(0, 2)) == 0:
        names = draw(st.lists(st.sampled_from(sorted(HEADERS)), max_size=3))
        headers += [(name, draw(st.sampled_from(HEADERS[name]) | header_text)) for name in names]
    if draw(st.integers(0, 5)):
        return Wild(written("POST", path, [*headers, ("Content-Length", str(len(body)))], body))
    size = draw(st.integers(1, 100))
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    return Wild(written("POST", path, [*headers, ("Transfer-Encoding", "chunked")], chunked))


@st.composite
def odd(draw: st.DrawFn) -> Wild:
    """Any method, any path; the answer to HEAD has no body."""
    method, path = draw(st.sampled_from(METHODS)), draw(st.sampled_from(PATHS))
    body = draw(st.sampled_from([b"", b"{}", b"null", b"[" * 100, b"\xff"]))
    headers = [("Content-Type", JSON), ("Content-Length", str(len(body)))]
    return Wild(written(method, path, headers, body))


@st.composite
def raw(draw: st.DrawFn) -> Wild:
    """Bytes that may be no HTTP at all, or that stop in the middle."""
    good = written(
        "POST", "/v1/completions", [("Content-Type", JSON), ("Content-Length", "40")], b'{"prompt": "x"'
    )
    kind = draw(st.integers(0, 4))
    if kind == 0:
        return Wild(draw(st.binary(max_size=300)), whole=False)
    if kind == 1:
        return Wild(good[: draw(st.integers(0, len(good)))], whole=False)
    if kind == 2:
        at = draw(st.integers(0, len(good)))
        return Wild(good[:at] + draw(st.binary(min_size=1, max_size=5)) + good[at:], whole=False)
    lengths = ["-1", "+5", "0x10", "1e3", "9" * 30, "5, 5", " 5 ", "", "\x0b5"]
    if kind == 3:
        return Wild(
            written("POST", "/tokenize", [("Content-Length", draw(st.sampled_from(lengths)))]), whole=False
        )
    both = [
        ("Content-Length", "5"),
        ("Transfer-Encoding", draw(st.sampled_from(["chunked", "x", "gzip, chunked"]))),
    ]
    return Wild(written("POST", "/tokenize", both, b"2\r\n{}\r\n0\r\n\r\n"), whole=False)


wild = st.integers(0, 9).flatmap(lambda kind: posted() if kind < 7 else odd() if kind < 9 else raw())
