"""Calls that must or may be made: through official clients the demo model cannot write an invalid one."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.server.conftest import Live
from tests.server.test_tools import BOTH, CHAT, PARIS, SUM, WEATHER, called, joined

ZONE = {"type": "object", "properties": {"zone": {"enum": ["utc", "cet"]}}, "required": ["zone"]}
NOW = {"type": "function", "function": {"name": "now", "parameters": {**ZONE, "additionalProperties": False}}}
ODD = {"type": "function", "function": {"name": "odd", "parameters": {"properties": {"a": {"not": {}}}}}}
NAMED = {"type": "function", "function": {"name": "now"}}
ASK: dict[str, Any] = {
    "model": "demo",
    "messages": SUM,
    "tools": [WEATHER, NOW],
    "max_tokens": 300,
    "seed": 1,
    "temperature": 1,
}
NUMBER = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
AS_NUMBER = {
    "type": "json_schema",
    "json_schema": {"name": "n", "schema": {**NUMBER, "additionalProperties": False}},
}


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with live.client() as client:
        yield client


def check(calls: list[tuple[str, Any]]) -> None:
    for name, arguments in calls:
        assert (name == "now" and arguments in ({"zone": "utc"}, {"zone": "cet"})) or (
            name == "get_weather" and isinstance(arguments["city"], str)
        )


def test_a_call_that_is_required_is_made_by_every_output(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**ASK, tool_choice="required", n=4)
    for choice in whole.choices:
        assert choice.finish_reason == "tool_calls" and not choice.message.content
        assert called(choice.message)
        check(called(choice.message))


def test_a_function_that_is_named_is_called_once(client: openai.OpenAI) -> None:
    (choice,) = client.chat.completions.create(**ASK, tool_choice=NAMED).choices
    assert choice.finish_reason == "stop"  # as OpenAI says it
    ((name, arguments),) = called(choice.message)
    assert name == "now"
    check([(name, arguments)])
    found = joined(list(client.chat.completions.create(**ASK, tool_choice=NAMED, stream=True)))
    assert [(name, json.loads(text)) for _, name, text in found["calls"]] == called(choice.message)


def test_only_what_is_allowed_is_called(client: openai.OpenAI) -> None:
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}
    ask = {**ASK, "messages": PARIS}
    (choice,) = client.chat.completions.create(**ask, tool_choice=allowed).choices
    assert {name for name, _ in called(choice.message)} == {"now"}
    auto = {**allowed, "allowed_tools": {**allowed["allowed_tools"], "mode": "auto"}}
    (choice,) = client.chat.completions.create(**ask, tool_choice=auto).choices
    assert {name for name, _ in called(choice.message)} <= {"now"}


def test_at_most_one_call_ends_the_answer(client: openai.OpenAI) -> None:
    ask = {**ASK, "messages": BOTH, "tools": [WEATHER], "temperature": 0}
    both = client.chat.completions.create(**ask)
    one = client.chat.completions.create(**ask, parallel_tool_calls=False)
    assert len(called(both.choices[0].message)) == 2
    assert len(called(one.choices[0].message)) == 1
    assert one.usage.completion_tokens < both.usage.completion_tokens


def test_the_model_thinks_before_a_call_that_is_required(client: openai.OpenAI) -> None:
    ask = {**ASK, "reasoning_effort": "high", "temperature": 0}
    (choice,) = client.chat.completions.create(**ask, tool_choice="required").choices
    assert "17 + 25" in choice.message.model_extra["reasoning"]
    assert called(choice.message)


def test_calls_are_required_over_several_turns(client: openai.OpenAI) -> None:
    turns: list[Any] = list(PARIS)
    for _ in range(3):
        message = (
            client.chat.completions.create(**{**ASK, "messages": turns}, tool_choice="required")
            .choices[0]
            .message
        )
        check(called(message))
        turns.append(message.model_dump(exclude_none=True))
        turns += [
            {"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls
        ]
    (choice,) = client.chat.completions.create(**{**ASK, "messages": turns}, tool_choice="none").choices
    assert not choice.message.tool_calls


def test_a_stop_string_ends_a_call_as_it_is(client: openai.OpenAI) -> None:
    (choice,) = client.chat.completions.create(**ASK, tool_choice=NAMED, stop="zone").choices
    ((call),) = choice.message.tool_calls
    assert call.function.arguments.strip() in ("{", '{"', "")
    assert choice.finish_reason == "stop"


def test_text_follows_its_schema_or_tools_are_called(live: Live) -> None:
    for messages in (SUM, PARIS):
        body = {**ASK, "messages": messages, "response_format": AS_NUMBER, "n": 4}
        for choice in live.post(CHAT, json=body).json()["choices"]:
            message = choice["message"]
            if calls := message.get("tool_calls"):
                check([(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls])
            else:
                assert isinstance(json.loads(message["content"])["sum"], int)
    forced = live.post(CHAT, json={**ASK, "response_format": AS_NUMBER, "tool_choice": "required"}).json()
    assert forced["choices"][0]["message"]["tool_calls"]


def test_a_schema_that_cannot_be_obeyed_is_no_error_unless_a_call_is_required(live: Live) -> None:
    body = {**ASK, "messages": PARIS, "tools": [WEATHER, ODD], "temperature": 0}
    found = live.post(CHAT, json=body).json()
    assert found["warnings"] == ["the schema of 'odd' cannot be obeyed; its arguments may be any object"]
    assert found["choices"][0]["finish_reason"] == "tool_calls"
    refused = live.post(CHAT, json={**body, "tool_choice": "required"})
    assert refused.status_code == 400
    assert "'odd'" in refused.json()["error"]["message"] and "not" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    "parameters", [{"properties": [1]}, [], "{", {"$ref": "#/x"}, {"type": 5}, {"required": 7}]
)
def test_whatever_a_tool_has_for_a_schema_the_answer_comes(live: Live, parameters: object) -> None:
    tool = {"type": "function", "function": {"name": "odd", "parameters": parameters}}
    answer = live.post(CHAT, json={**ASK, "tools": [tool], "max_tokens": 4})
    assert answer.status_code in (200, 400)


@pytest.mark.parametrize(
    "more",
    [
        {"tool_choice": {"type": "function", "function": {"name": "nobody"}}},
        {"tool_choice": {"type": "custom"}},
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "no", "tools": [NAMED]}}},
        {"tool_choice": "required", "tools": []},
        {"tool_choice": "required", "ignore_eos": True},
    ],
)
def test_what_cannot_be_called_says_so(live: Live, more: dict[str, Any]) -> None:
    answer = live.post(CHAT, json={**ASK, **more})
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith(
        ("tool_choice", "ignore_eos")
    )


def test_anthropics_client_requires_calls_and_forms(live: Live) -> None:
    tools = [
        {"name": t["function"]["name"], "input_schema": t["function"]["parameters"]} for t in (WEATHER, NOW)
    ]
    ask: dict[str, Any] = {"model": "demo", "messages": SUM, "max_tokens": 300}
    form = {"format": {"type": "json_schema", "schema": AS_NUMBER["json_schema"]["schema"]}}
    with anthropic.Anthropic(base_url=live.url, api_key="none") as client:
        for choice in (
            {"type": "any"},
            {"type": "tool", "name": "now"},
            {"type": "any", "disable_parallel_tool_use": True},
        ):
            message = client.messages.create(**ask, tools=tools, tool_choice=choice)
            assert message.stop_reason == "tool_use"
            calls = [(block.name, block.input) for block in message.content if block.type == "tool_use"]
            assert calls
            assert len(choice) == 1 or len(calls) == 1
            check(calls)
        *_, block = client.messages.create(**ask, output_config=form).content
        assert isinstance(json.loads(block.text)["sum"], int)


def test_responses_require_calls(client: openai.OpenAI) -> None:
    tools = [{"type": "function", **tool["function"]} for tool in (WEATHER, NOW)]
    for choice in ("required", {"type": "function", "name": "now"}):
        ask = {"model": "demo", "input": SUM[0]["content"], "temperature": 1, "max_output_tokens": 300}
        response = client.responses.create(**ask, tools=tools, tool_choice=choice)
        calls = [
            (each.name, json.loads(each.arguments))
            for each in response.output
            if each.type == "function_call"
        ]
        assert calls and (choice == "required" or [name for name, _ in calls] == ["now"])
        check(calls)


def test_a_call_that_is_required_goes_on_elsewhere(live: Live) -> None:
    def stream(**more: Any) -> list[dict[str, Any]]:
        body = {**ASK, "tool_choice": "required", "stream": True, "return_token_ids": True, **more}
        text = live.post(CHAT, json=body, headers={"X-Request-Id": "broken"}).text
        return [json.loads(event.removeprefix("data: "))["choices"][0] for event in text.split("\n\n")[:-2]]

    tokens = [token for choice in stream() for token in choice.get("token_ids", ())]
    for had in (1, len(tokens) // 2, len(tokens) - 1):
        rest = stream(resume={"choices": [{"index": 0, "token_ids": tokens[:had]}]})
        assert [token for choice in rest for token in choice.get("token_ids", ())] == tokens[had:]
