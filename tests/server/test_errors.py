"""What clients read when something goes wrong."""

import openai
import pytest

from quire.engine.service import Status
from quire.errors import EngineDead, RequestFailed
from quire.server.errors import ApiError, error_of
from tests.server.conftest import FRANCE, InProcess, Live, serving

OK = {"prompt": "hello", "max_tokens": 1}


def error(answer: object, status: int, kind: str, param: str | None = None) -> dict[str, object]:
    """The error of an answer, whose shape is always the same."""
    assert answer.status_code == status, answer.text
    (found,) = answer.json().values()
    assert {"message", "type", "param", "code"} <= found.keys()
    assert (found["type"], found["param"]) == (kind, param), found
    return found


@pytest.mark.parametrize(
    ("wrong", "param", "words"),
    [
        ({"temperature": 7}, "temperature", "from 0 to 2"),
        ({"temperature": "warm"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"n": 17}, "n", "at most 16"),
        ({"n": 2, "temperature": 0}, "n", "all outputs would be equal"),
        ({"stop": [""]}, "stop", "non-empty"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"bad_words": ["x"] * 129}, "bad_words", "at most 128"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x.[key]", "integer"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "from -100 to 100"),
        ({"logprobs": 21}, "logprobs", "max_logprobs"),
        ({"min_tokens": 2}, "min_tokens", "at most max_tokens"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [5, 10**6]}, "prompt", "4095"),
        ({"prompt": ["a"] * 2049}, "prompt", "at most 2048"),
        ({"prompt": ["a"] * 2048, "n": 2, "temperature": 1}, "prompt", "2048"),
        ({"top_k": 2**40}, "top_k", "less than"),
        ({"priority": 2**40}, "priority", "less than"),
        ({"cache_salt": "s" * 129}, None, "128"),
        ({"stream_options": {}}, "stream_options", "set stream"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "cannot be streamed"),
        ({"best_of": 2}, "best_of", "use n"),
        ({"suffix": "end"}, "suffix", "middle"),
        ({"request_id": "a b"}, "request_id", "pattern"),
    ],
)
def test_wrong_values_name_the_field_and_the_rule(
    live: Live, wrong: dict[str, object], param: str | None, words: str
) -> None:
    found = error(live.post("/v1/completions", json={**OK, **wrong}), 400, "BadRequestError", param)
    assert words in found["message"] and found["code"] == 400


@pytest.mark.parametrize(
    ("field", "value", "status"),
    [
        ("modalities", ["text", "audio"], 501),
        ("chat_template", "{{ messages }}", 400),
        ("functions", [{"name": "f"}], 400),
    ],
)
def test_what_is_not_there_says_so(live: Live, field: str, value: object, status: int) -> None:
    kind = "NotImplementedError" if status == 501 else "BadRequestError"
    answer = live.post("/v1/chat/completions", json={"messages": FRANCE, field: value})
    assert str(error(answer, status, kind, field)["message"]).startswith(field)


def test_values_that_ask_for_nothing_are_accepted(live: Live) -> None:
    nothing = {"tools": [], "response_format": {"type": "text"}, "best_of": 1, "structured_outputs": None}
    assert live.post("/v1/completions", json={**OK, **nothing}).status_code == 200


def test_unknown_fields_are_named_in_a_warning(live: Live) -> None:
    whole = live.post("/v1/completions", json={**OK, "temperatures": 1, "echo": False}).json()
    assert whole["warnings"] == ["'temperatures' is not a known field; it had no effect"]
    stream = live.post("/v1/completions", json={**OK, "temperatures": 1, "stream": True}).text
    assert stream.count("temperatures") == 1
    assert "warnings" not in live.post("/v1/completions", json=OK).json()


def test_an_unknown_model_is_not_found(live: Live) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has demo, small") as caught:
        live.client().completions.create(model="gpt-5", prompt="hello")
    assert caught.value.param == "model"
    assert live.get("/v1/models/none/such").status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_has_counts(live: Live, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        live.client().completions.create(model="demo", prompt=[5] * 3000, stream=stream)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "input_tokens"
    assert (caught.value.body["num_tokens"], caught.value.body["max_model_len"]) == (3000, 2048)


def test_more_tokens_than_there_is_room_for_is_a_cap(live: Live) -> None:
    body = {"prompt": [5] * 2040, "max_tokens": 10**6, "ignore_eos": True}
    answer = live.post("/v1/completions", json=body).json()
    assert answer["usage"]["total_tokens"] == 2048 and answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (b"{", "application/json", "JSON"),
        (b"", "application/json", "JSON"),
        (b"[]", "application/json", "object"),
        (b"{}", "application/json", "prompt: Field required"),
        (b"{}", "text/plain", "Unsupported Media Type"),
        (b'{"prompt": "\xff"}', "application/json", "JSON"),
        (b'{"prompt": "\\ud800"}', "application/json", "JSON"),  # half a character
    ],
)
def test_bodies_that_are_none(live: Live, content: bytes, kind: str, words: str) -> None:
    answer = live.post("/v1/completions", content=content, headers={"content-type": kind})
    assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text


def test_paths_and_methods_that_are_not_there(live: Live) -> None:
    error(live.get("/v1/nothing"), 404, "NotFoundError")
    error(live.get("/v1/completions"), 405, "MethodNotAllowedError")
    error(live.post("/tokenize/", json={}), 404, "NotFoundError")  # no redirect, which Host would direct


def test_conversations_that_make_no_sense(live: Live) -> None:
    for messages in ([], ["hello"], [{"content": "no role"}], [{"role": "user", "content": 5}]):
        answer = live.post("/v1/chat/completions", json={"messages": messages})
        assert answer.status_code == 400, answer.text
    reserved = {"messages": FRANCE, "chat_template_kwargs": {"messages": []}}
    error(live.post("/v1/chat/completions", json=reserved), 400, "BadRequestError", "chat_template_kwargs")
    image = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
    answer = live.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": [image]}]})
    assert answer.status_code == 400 and "image_url" in answer.text


def test_unknown_exceptions_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    found = error_of(RuntimeError("secret at 0x7f00"), "id-1")
    assert found.status == 500 and "secret" not in str(found.body()) and "id-1" in found.message
    assert "secret" in caplog.text
    assert "kv" not in str(error_of(RequestFailed("kv broke"), "id-2").body())
    dead = error_of(EngineDead("pid 7"), "id-3")
    assert dead.status == 503 and dead.headers["Retry-After"] and "7" not in dead.message


def test_a_failure_before_and_within_a_stream(service: InProcess) -> None:
    with serving(service, request_timeout=1e-6) as live:
        error(live.post("/v1/completions", json=OK), 504, "TimeoutError")
        error(live.post("/v1/completions", json={**OK, "stream": True}), 504, "TimeoutError")


def test_a_call_may_say_how_long_it_is_worth(live: Live) -> None:
    long = {"prompt": "hello", "max_tokens": 1500, "ignore_eos": True}
    for options in ({}, {"stream": True}):  # of a stream, as an event, if it has begun
        answer = live.post("/v1/completions", json={**long, **options}, headers={"X-Request-Timeout": "0.05"})
        assert '"code":504' in answer.text
    live.until_calls(0)
    for wrong in ("0", "-1", "x", "inf", "1e3", "nan"):
        answer = live.post("/v1/completions", json=OK, headers={"X-Request-Timeout": wrong})
        assert "above 0" in error(answer, 400, "BadRequestError", "x-request-timeout")["message"]
    answer = live.post("/v1/completions", json=OK, headers={"X-Request-Timeout": "600.5"})
    assert answer.status_code == 200


def test_an_error_in_a_stream_is_an_event_and_then_done(service: InProcess) -> None:
    with serving(service) as live:
        body = {"prompt": "hello", "max_tokens": 1500, "ignore_eos": True}
        with live.client().completions.create(
            model="demo", prompt="hello", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
        ) as stream:
            next(stream)
            live.drain(0)
            with pytest.raises(openai.APIError, match="the server stops"):
                list(stream)
        live.until_calls(0)
        answer = live.post("/v1/completions", json=body)
        assert answer.headers["retry-after"]
        error(answer, 503, "ServiceUnavailableError")
        assert live.get("/readyz").status_code == 503 and live.get("/livez").status_code == 200


def test_an_engine_that_is_not_ready(service: InProcess) -> None:
    engine = InProcess(service.engine)
    with serving(engine) as live:
        wanted = {Status.STARTING: (503, 503), Status.RESTARTING: (503, 200), Status.DEAD: (503, 200)}
        for status, (ready, started) in wanted.items():
            engine.status = status
            assert live.get("/readyz").status_code == ready and live.get("/startupz").status_code == started
            assert live.get("/livez").status_code == 200
            taken = status is Status.RESTARTING  # requests wait, and lose nothing
            assert live.post("/v1/completions", json=OK).status_code == (200 if taken else 503)
            assert live.get("/health").status_code == (200 if taken else 503)
        engine.status = Status.READY


def test_long_messages_are_cut() -> None:
    assert len(ApiError(400, "x" * 10_000).body()["error"]["message"]) < 2100
