"""The form of texts over HTTP: by every name of it, streamed or not, and refused without harm to others."""

import json
import re
import resource
import threading
from pathlib import Path

import openai
import pytest

from tests.grammar.test_structured import SCHEMA, check
from tests.server.conftest import FRANCE, Live

STRICT = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
NO_THOUGHTS = {"4090": -100}  # a thought may fill all there is room for
CHAT = {
    "model": "demo",
    "messages": FRANCE,
    "max_tokens": 300,
    "temperature": 1,
    "logit_bias": NO_THOUGHTS,
}


def test_a_chat_answers_by_a_schema(live: Live) -> None:
    with live.client() as client:
        answer = client.chat.completions.create(**CHAT, response_format=STRICT, n=2)
    for choice in answer.choices:
        check(choice.message.content)


def test_a_streamed_chat_answers_by_a_schema(live: Live) -> None:
    with live.client() as client:
        stream = client.chat.completions.create(**CHAT, response_format=STRICT, stream=True)
        check("".join(chunk.choices[0].delta.content or "" for chunk in stream))


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": "a[0-9]{3}"}}, "a[0-9]{3}"),
        ({"guided_regex": "a[0-9]{3}"}, "a[0-9]{3}"),
        ({"guided_choice": ["left", "right"]}, "left|right"),
        ({"guided_grammar": 'start: "x" | "y"', "guided_decoding_backend": "xgrammar"}, "x|y"),
        ({"guided_json": {"type": "boolean"}, "guided_whitespace_pattern": " "}, " *(true|false) *"),
        ({"structured_outputs": {"choice": ["one"]}}, "one"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_each_name_is_obeyed(live: Live, path: str, fields: dict[str, object], pattern: str) -> None:
    body = {"prompt": "Hi", "messages": FRANCE, "max_tokens": 30, "logit_bias": NO_THOUGHTS, **fields}
    choice = live.post(path, json=body).json()["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    assert re.fullmatch(pattern, text) and choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "schema"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs", "regexp"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a"}, "guided_json": {}}, "structured_outputs", "both"),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "structured_outputs", "uniqueItems"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos", "off"),
    ],
)
def test_what_is_wrong_is_named(live: Live, fields: dict[str, object], param: str, words: str) -> None:
    answer = live.post("/v1/completions", json={"prompt": "Hi", **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and words in error["message"]


HOSTILE = [
    {"regex": "((((a|b){1,999}){1,999}){1,999}c)" * 20},
    {"regex": "(" * 20_000 + "a" + ")" * 20_000},
    {"grammar": "start: " + "(" * 50_000},
    {"json": '{"properties":{"a":' * 60 + "{}" + "}}" * 60},
    {"json": {"allOf": [{"anyOf": [{"type": "string", "pattern": f"(a|b{i})*"}] * 40} for i in range(40)]}},
    {"json": {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(3000)}}},
    {"choice": ["x" * 300_000]},
    {"choice": ["a"] * 50_000},
    {"regex": "((a|aa)+){1000}b"},
    {"regex": "(x{1,1000}){1,1000}"},
    {"regex": "a{1000000000}"},
    {"regex": r"[\p{L}]{1,100000}"},
    {"grammar": 'start: start start | "a"'},
    {"grammar": 'start: start "b" |'},
    {"grammar": "start: a\na: b\nb: a"},
    {"grammar": 'start: (x x x x x x)*\nx: ("a"?)*'},
    {"grammar": '%ignore /(a|b)*c{1000}/\nstart: "x"{100000}'},
    {"grammar": "start: " + " ".join(f"r{i}" for i in range(3000)) + '\nr0: "a"' * 3000},
    {"json": {"$ref": "#"}},
    {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}},
    {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"type": "object"}]}}}},
    {"json": {"$ref": "file:///etc/passwd"}},
    {"json": {"$ref": "#/nowhere"}},
    {"json": {"enum": [f"value number {i}" for i in range(9000)]}},
    {"json": {"type": "array", "minItems": 10**9, "items": {"type": "integer"}}},
    {"json": {"type": "string", "minLength": 10**8, "maxLength": 10**9}},
    {"json": {"type": "integer", "minimum": -(10**300), "maximum": 10**300}},
    {"json": {"type": "integer", "minimum": 10**400}},
    {"json": {"type": "number", "multipleOf": 1e-300}},
    {
        "json": {
            "anyOf": [{"properties": {f"p{i}": {"type": "string"} for i in range(j)}} for j in range(100)]
        }
    },
    {"json": {"patternProperties": {f"({c}|b)*a(a|b){{200}}": {"type": "integer"} for c in "acd"}}},
    {"json": {"oneOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(30)]}},
    {"json": '{"const": "\\ud800"}'},
    {"json": {"allOf": 5, "format": "date"}},
    {"json": {"properties": {"a": 5}, "$defs": []}},
    {"structural_tag": {"structures": 5, "triggers": ["<"]}},
    {"structural_tag": {"structures": [{"begin": "<", "schema": {}, "end": ""}], "triggers": ["<"]}},
    {"json_object": True, "whitespace_pattern": "(a|b)*a(a|b){200}"},
    {"json_object": True, "whitespace_pattern": "("},
]
MOST_GROWN = 1 << 30


def memory_bytes() -> int:
    """Of this process, in which the engine is."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
def test_hostile_grammars_leave_streams_alone(live: Live) -> None:
    """Each is answered or refused, and what streams meanwhile is what it is alone."""
    request = {**CHAT, "temperature": 0, "max_tokens": 200, "extra_body": {"ignore_eos": True}}

    def text(client: openai.OpenAI) -> str:
        stream = client.chat.completions.create(**request, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with live.client() as client:
        alone, texts, done, before = text(client), list[str](), threading.Event(), memory_bytes()

        def streams() -> None:
            while not done.is_set():
                texts.append(text(client))

        thread = threading.Thread(target=streams)
        thread.start()
        try:
            for asked in HOSTILE:
                body = {"prompt": "Hi", "max_tokens": 8, "structured_outputs": asked}
                answer = live.post("/v1/completions", json=body)
                assert answer.status_code in (200, 400), (str(asked)[:100], answer.text)
                assert answer.status_code == 200 or json.loads(answer.text)["error"]["param"]
        finally:
            done.set()
            thread.join(120)
    assert texts and {*texts} == {alone}
    assert memory_bytes() - before < MOST_GROWN
