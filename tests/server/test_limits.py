"""Nothing grows with what a client sends before it is known how much that is."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.server import http
from quire.server.errors import ApiError
from quire.server.limits import MAX_JSON_CONTAINERS, MAX_JSON_DEPTH, MAX_JSON_VALUES, check_structure
from tests.server.conftest import FRANCE, InProcess, Live, serving
from tests.server.raw import connect, head, read_all, status

POST = b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
leaves = st.none() | st.booleans() | st.integers() | st.text()
trees = st.recursive(leaves, lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text(), t, max_size=3))


def depth(value: object) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if children is None else 1 + max(map(depth, children), default=0)


@given(trees, st.integers(0, MAX_JSON_DEPTH))
@settings(derandomize=True, deadline=None)
def test_depth_is_counted_outside_strings(value: object, extra: int) -> None:
    for _ in range(extra):
        value = [value, '[{"\\']
    text = json.dumps(value).encode()
    if depth(value) <= MAX_JSON_DEPTH:
        check_structure(text)
    else:
        with pytest.raises(ApiError, match="nested more than 64 deep"):
            check_structure(text)


@pytest.mark.parametrize(
    "text",
    [b'"\\' * 2_000_000, b'"' + b"\\" * 4_000_001, b'""' * 2_000_000, b"\\" * 4_000_000, b'"a' * 2_000_000],
)
def test_quotes_without_end_take_one_pass(text: bytes) -> None:
    check_structure(text)  # a pattern that goes back would take hours


def test_many_small_values_are_refused() -> None:
    with pytest.raises(ApiError, match="objects and lists"):
        check_structure(b"[" + b"[]," * MAX_JSON_CONTAINERS + b"[]]")
    with pytest.raises(ApiError, match="values"):
        check_structure(b"[" + b"1," * (MAX_JSON_VALUES + 1) + b"1]")
    check_structure(b'["' + b"[,{" * MAX_JSON_VALUES + b'"]')


def test_a_body_that_announces_too_much_is_not_read(service: InProcess) -> None:
    with serving(service, max_request_bytes=1000) as live, connect(live.url) as connection:
        connection.sendall(POST + b"Content-Length: 1001\r\n\r\n")
        answer = read_all(connection)
        assert status(answer) == 413 and b"larger than 1000 bytes" in answer


def test_a_body_in_pieces_is_counted_as_it_comes(service: InProcess) -> None:
    with serving(service, max_request_bytes=100_000) as live, connect(live.url) as connection:
        connection.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        piece = b"2710\r\n" + b" " * 10_000 + b"\r\n"
        try:
            for _ in range(1_000):  # 10 MB, of which the server takes little more than its limit
                connection.sendall(piece)
        except OSError:
            pass
        else:
            pytest.fail("the server took everything")


def test_a_body_of_the_limit_is_taken(service: InProcess) -> None:
    with serving(service, max_request_bytes=1000) as live:
        body = b'{"prompt": "hello", "max_tokens": 1}'
        for size, want in ((1000, 200), (1001, 413)):
            answer = live.post(
                "/v1/completions", content=body.ljust(size), headers={"content-type": "application/json"}
            )
            assert answer.status_code == want


def test_headers_have_an_end(live: Live) -> None:
    assert status(head(live.url, "GET /version", f"X-Long: {'x' * 50_000}")) == 200
    assert status(head(live.url, "GET /version", *(f"X-{i}: {'x' * 1000}" for i in range(200)))) in (0, 400)
    with connect(live.url) as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nX-Long: ")
        try:
            for _ in range(1_000):
                connection.sendall(b"x" * 10_000)
        except OSError:
            return
        pytest.fail("the server took a header of 10 MB")


def test_deep_bodies_and_compressed_ones(live: Live) -> None:
    deep = b'{"prompt": "x", "deep": ' + b"[" * 100 + b"]" * 100 + b"}"
    answer = live.post("/v1/completions", content=deep, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "64 deep" in answer.text
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    assert live.post("/v1/completions", content=b"{}", headers=headers).status_code == 400


def test_many_messages(live: Live) -> None:
    answer = live.post("/v1/chat/completions", json={"messages": FRANCE * 4097})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages"


def test_many_wrong_items_make_one_message(live: Live) -> None:
    answer = live.post("/v1/completions", json={"prompt": [None] * 100_000})
    assert answer.status_code == 400 and len(answer.content) < 3000


def test_scores_of_prompts_are_bounded(service: InProcess) -> None:
    with serving(service) as live:
        body = {"prompt": [[5] * 2000] * 101, "max_tokens": 1, "prompt_logprobs": 20}
        answer = live.post("/v1/completions", json=body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt_logprobs"


def test_headers_have_a_time(service: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends them byte by byte, or nothing at all, holds no connection for ever."""
    monkeypatch.setattr(http, "HEAD_TIMEOUT_S", 0.2)
    with serving(service) as live:
        for begun in (b"", b"\r\n", b"POST /v1/comp", POST):
            with connect(live.url) as connection:
                connection.sendall(begun)
                assert status(read_all(connection)) == 408
        with connect(live.url) as connection:  # the time begins again with every request
            connection.sendall(b"GET /version HTTP/1.1\r\nHost: test\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            connection.sendall(b"GET /ver")
            assert status(read_all(connection)) == 408
        body = b'{"prompt": "hello", "max_tokens": 300, "ignore_eos": true}'
        with connect(live.url) as connection:  # what takes longer than that is no head
            connection.sendall(POST + f"Content-Length: {len(body)}\r\n\r\n".encode() + body + b"GET /next")
            assert status(connection.recv(65536)) == 200
