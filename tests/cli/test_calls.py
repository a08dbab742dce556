"""Answers in pieces: server-sent events cut anywhere, and what each event counts for."""

import json

import pytest

from quire.cli.calls import Answer, Api, Question
from quire.cli.client import error_text, refusal
from quire.cli.report import Timed
from quire.cli.sse import Events

STREAM = (
    b': a comment\n\ndata: {"a": 1}\n\n'
    b'event: x\r\nid: 3\r\ndata:{"b": "\xc3\xa4"}\r\n\r\n'
    b"data: two\ndata: lines\n\n\n\n"
    b"data: [DONE]\n\ndata: never ended\n"
)
EVENTS = [b'{"a": 1}', b'{"b": "\xc3\xa4"}', b"two\nlines", b"[DONE]"]


def test_events_at_every_split() -> None:
    for cut in range(len(STREAM) + 1):
        events = Events()
        assert events.feed(STREAM[:cut]) + events.feed(STREAM[cut:]) == EVENTS


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_events_in_small_pieces(size: int) -> None:
    events = Events()
    pieces = [STREAM[i : i + size] for i in range(0, len(STREAM), size)]
    assert [event for piece in pieces for event in events.feed(piece)] == EVENTS


def read(*chunks: object, tail: bytes = b"data: [DONE]\n\n") -> Answer:
    """Chunk number i arrives at i seconds."""
    answer = Answer(Timed(input_len=5), keep_text=True)
    for now, chunk in enumerate(chunks):
        answer.take(b"data: " + json.dumps(chunk).encode() + b"\n\n", float(now))
    answer.take(tail, float(len(chunks)))
    return answer


def text(word: str, finish_reason: str | None = None) -> dict[str, object]:
    return {"choices": [{"index": 0, "text": word, "logprobs": None, "finish_reason": finish_reason}]}


def delta(finish_reason: str | None = None, **fields: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish_reason}]}


def test_a_completion() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 9, "total_tokens": 13}}
    answer = read(text("a"), text("b"), text("", "stop"), usage)
    assert answer.timed.times == [0.0, 1.0]
    assert answer.timed.texts == ["a", "b"]
    assert (answer.timed.input_len, answer.timed.output_len) == (4, 9)
    assert answer.ended
    assert answer.counted


def test_who_speaks_is_not_the_first_token() -> None:
    answer = read(delta(role="assistant", content=""), delta(content="Hi"), delta(content="!"), delta("stop"))
    assert answer.timed.times == [1.0, 2.0]


def test_thinking_and_calls_of_tools_are_output() -> None:
    answer = read(delta(reasoning="so"), delta(reasoning_content="hm"), delta(tool_calls=[{"index": 0}]))
    assert answer.timed.times == [0.0, 1.0, 2.0]
    assert answer.timed.texts == ["so", "hm"]


def test_an_answer_without_text_ends_when_it_says_so() -> None:
    assert read(delta(role="assistant", content=""), delta("stop")).timed.times == [1.0]


@pytest.mark.parametrize("error", [{"message": "logits are NaN", "code": 500}, "logits are NaN"])
def test_an_error_in_the_stream(error: object) -> None:
    assert read(text("a"), {"error": error}).timed.error == "in the stream: logits are NaN"


@pytest.mark.parametrize("event", [b"data: {\n\n", b'data: {"choices": 3}\n\n', b"data: \xff\n\n"])
def test_events_of_another_form_are_an_error(event: bytes) -> None:
    assert "not in OpenAI's form" in read(tail=event).timed.error


def test_pieces_and_events_do_not_coincide() -> None:
    data = b"".join(b"data: " + json.dumps(text(w)).encode() + b"\n\n" for w in "abc")
    answer = Answer(Timed(), keep_text=True)
    for now in range(len(data)):
        answer.take(data[now : now + 1], float(now))
    assert answer.timed.texts == ["a", "b", "c"]
    assert answer.timed.times == [float(i) for i in range(len(data)) if data[: i + 1].endswith(b"\n\n")]


def test_bodies() -> None:
    question = Question("Hello", 1, 30)
    body = Api(chat=False, path="/", model="m", ignore_eos=True, extra={"top_k": 5, "max_tokens": 8}).body(
        question
    )
    assert json.loads(body) == {
        "model": "m",
        "prompt": "Hello",
        "max_tokens": 8,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "top_k": 5,
    }
    body = Api(chat=True, path="/", model="m", ignore_eos=False, extra={}).body(question)
    assert json.loads(body) == {
        "model": "m",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_completion_tokens": 30,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "too long", "code": 400}}', "too long"),
        (b'{"error": "Unauthorized"}', "Unauthorized"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"error": {}}', "{'error': {}}"),
        (b"<html>\n nothing </html>", "<html> nothing </html>"),
        (b"\xff", "\ufffd"),
        (b"", ""),
    ],
)
def test_messages_of_errors(body: bytes, message: str) -> None:
    assert error_text(body) == message


def test_refusals_name_their_status() -> None:
    assert refusal(503, b'{"error": {"message": "full"}}') == "503 Service Unavailable: full"
    assert refusal(429, b"") == "429 Too Many Requests"
    assert refusal(799, b"") == "799"
