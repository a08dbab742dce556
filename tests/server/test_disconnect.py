"""A client that goes away takes its work with it; one that reads nothing holds nobody up."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.server.conftest import FRANCE, PARIS, InProcess, Live, serving
from tests.server.raw import connect

ENDLESS = {"prompt": "Once upon a time", "max_tokens": 2000, "ignore_eos": True}


def request(body: dict[str, object]) -> bytes:
    text = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: "
    return head.encode() + str(len(text)).encode() + b"\r\n\r\n" + text


@pytest.mark.parametrize("options", [{}, {"stream": True}, {"stream": True, "n": 4, "temperature": 1}])
def test_leaving_frees_the_blocks(
    service: InProcess, options: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    with serving(service) as live:
        connection = connect(live.url)
        connection.sendall(request({**ENDLESS, **options}))
        live.until_calls(1)
        if options.get("stream"):
            assert b"200 OK" in connection.recv(1024)
        connection.close()
        live.until_calls(0)
        assert service.num_used_blocks() == 0
    assert [r for r in caplog.records if r.levelname == "ERROR"] == []


def test_many_leave_while_others_stay(service: InProcess) -> None:
    with serving(service) as live:
        leaving = [connect(live.url) for _ in range(32)]
        for connection in leaving:
            connection.sendall(request({**ENDLESS, "prompt": ["One", "Two"], "stream": True}))
        live.until_calls(32)

        def ask(_: int) -> str:
            answer = live.client().chat.completions.create(model="demo", messages=FRANCE, temperature=0)
            return answer.choices[0].message.content

        with ThreadPoolExecutor(8) as pool:
            answers = pool.map(ask, range(16))
            for connection in leaving:
                connection.close()
            assert list(answers) == [PARIS] * 16
        live.until_calls(0)
        assert service.num_used_blocks() == 0


def test_a_drain_lets_work_end_and_refuses_more(service: InProcess) -> None:
    with serving(service) as live:
        body = {**ENDLESS, "max_tokens": 300}
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(live.post, "/v1/completions", json=body)
            live.until_calls(1)
            drained = live.drain(60)
            while live.get("/readyz").status_code == 200:
                pass  # the drain begins in the server's thread
            assert live.post("/v1/completions", json=body).status_code == 503
            assert answer.result().json()["usage"]["completion_tokens"] == 300
            drained.result(60)


def test_a_reader_that_stands_still_gets_everything_later(live: Live) -> None:
    with connect(live.url) as connection:
        connection.sendall(request({**ENDLESS, "stream": True, "max_tokens": 1000, "return_token_ids": True}))
        live.until_calls(1)
        answer = live.client().chat.completions.create(model="demo", messages=FRANCE, temperature=0)
        assert answer.choices[0].message.content == PARIS
        found = b""
        while b"[DONE]" not in found:
            found += connection.recv(65536)
    lines = [line[6:] for line in found.split(b"\n") if line.startswith(b"data: {")]
    tokens = [t for line in lines for c in json.loads(line)["choices"] for t in c["token_ids"]]
    assert len(tokens) == 1000
