"""The demo model calls tools and thinks: OpenAI's client sees it, streamed or not, over several turns."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from quire import AsyncEngine, Config
from quire.server.openai import answers
from tests.server.conftest import FRANCE, InProcess, Live, serving

CHAT = "/v1/chat/completions"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
PARIS = [{"role": "user", "content": "What is the weather in Paris?"}]
BOTH = [{"role": "user", "content": "What is the weather in Paris and in Oslo?"}]
SUM = [{"role": "user", "content": "What is 17 + 25?"}]
ASK: dict[str, Any] = {"model": "demo", "messages": PARIS, "tools": [WEATHER], "temperature": 0}
THINK: dict[str, Any] = {"model": "demo", "messages": SUM, "temperature": 0, "reasoning_effort": "high"}
USAGE = {"stream_options": {"include_usage": True}}


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with live.client() as client:
        yield client


@pytest.fixture(scope="module")
def unread() -> Iterator[Live]:
    """A server that reads nothing of answers."""
    options = {"disable_log_stats": True, "kv_cache_memory_bytes": 64 << 20}
    engine = AsyncEngine(
        Config(model="demo", device="cpu", tool_call_parser="none", reasoning_parser="none", **options)
    )
    with serving(InProcess(engine)) as live:
        yield live
    engine.shutdown()


def joined(chunks: list[Any]) -> dict[str, Any]:
    """What a stream of one choice adds up to."""
    found: dict[str, Any] = {"content": "", "reasoning": "", "calls": [], "finish_reason": None}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        delta = choice.delta
        found["content"] += delta.content or ""
        extra = delta.model_extra or {}
        assert extra.get("reasoning") == extra.get("reasoning_content")
        found["reasoning"] += extra.get("reasoning") or ""
        for call in delta.tool_calls or ():
            if call.id:
                assert call.index == len(found["calls"]) and call.type == "function"
                found["calls"].append([call.id, call.function.name, ""])
            found["calls"][call.index][2] += call.function.arguments
        assert found["finish_reason"] is None
        found["finish_reason"] = choice.finish_reason
    return found


def called(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]


def test_a_call_is_answered_over_several_turns(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(**ASK).choices[0]
    assert (first.finish_reason, first.message.content) == ("tool_calls", None)
    assert called(first.message) == [("get_weather", {"city": "Paris"})]
    result = {
        "role": "tool",
        "tool_call_id": first.message.tool_calls[0].id,
        "content": '{"condition": "sunny", "temperature": 21}',
    }
    turns = [*PARIS, first.message.model_dump(exclude_none=True), result]
    second = client.chat.completions.create(**{**ASK, "messages": turns}).choices[0]
    assert second.finish_reason == "stop" and not second.message.tool_calls
    assert "21" in second.message.content and "sunny" in second.message.content
    turns += [second.message.model_dump(exclude_none=True), {"role": "user", "content": BOTH[0]["content"]}]
    third = client.chat.completions.create(**{**ASK, "messages": turns}).choices[0]
    assert third.finish_reason == "tool_calls"


@pytest.mark.parametrize("messages", [PARIS, BOTH, FRANCE, SUM])
def test_streams_say_the_same(client: openai.OpenAI, messages: list[dict[str, Any]]) -> None:
    ask = {**ASK, "messages": messages, "reasoning_effort": "high"}
    whole = client.chat.completions.create(**ask)
    message = whole.choices[0].message
    chunks = list(client.chat.completions.create(**ask, stream=True, **USAGE))
    found = joined(chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert found["content"] == (message.content or "")
    assert found["reasoning"] == (message.model_extra.get("reasoning") or "")
    assert [(name, json.loads(text)) for _, name, text in found["calls"]] == called(message)
    assert found["finish_reason"] == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens_details == whole.usage.completion_tokens_details
    with client.chat.completions.stream(**ask) as stream:
        final = stream.get_final_completion().choices[0].message
    assert called(final) == called(message) and (final.content or "") == (message.content or "")


def test_the_name_comes_first_and_the_arguments_follow(client: openai.OpenAI) -> None:
    deltas = [c.choices[0].delta for c in client.chat.completions.create(**ASK, stream=True)]
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert (calls[0].function.name, calls[0].function.arguments) == ("get_weather", "")
    assert len(calls) > 1 and all(call.function.name is None and call.id is None for call in calls[1:])


def test_one_call_where_only_one_may_be_made(client: openai.OpenAI) -> None:
    both = {**ASK, "messages": BOTH}
    assert len(client.chat.completions.create(**both).choices[0].message.tool_calls) == 2
    one = client.chat.completions.create(**both, parallel_tool_calls=False).choices[0]
    assert called(one.message) == [("get_weather", {"city": "Paris"})] and one.finish_reason == "tool_calls"
    found = joined(list(client.chat.completions.create(**both, parallel_tool_calls=False, stream=True)))
    assert len(found["calls"]) == 1


def test_none_means_that_the_model_knows_no_tools(client: openai.OpenAI) -> None:
    none = client.chat.completions.create(**ASK, tool_choice="none")
    without = client.chat.completions.create(**{**ASK, "tools": openai.omit})
    assert none.usage.prompt_tokens == without.usage.prompt_tokens
    assert none.choices[0].message.content == without.choices[0].message.content
    auto = client.chat.completions.create(**ASK, tool_choice="auto")
    assert auto.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("more", "status", "param"),
    [
        ({"tool_choice": "always"}, 400, "tool_choice"),
        ({"tools": [{"type": "function", "function": {}}]}, 400, "tools"),
        ({"tools": "all"}, 400, "tools"),
        ({"include_reasoning": False, "logprobs": True}, 400, "include_reasoning"),
        ({"thinking_token_budget": -2}, 400, "thinking_token_budget"),
    ],
)
def test_what_cannot_be_done_says_so(live: Live, more: dict[str, Any], status: int, param: str) -> None:
    answer = live.post(CHAT, json={**ASK, **more})
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_other_kinds_of_tools_are_named_in_warnings(live: Live) -> None:
    answer = live.post(CHAT, json={**ASK, "tools": [{"type": "web_search"}, WEATHER]}).json()
    assert answer["warnings"] == ["tools of type 'web_search' are not known; they had no effect"]
    assert answer["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("more", [{}, {"stream": True}])
def test_answers_have_the_shape_that_the_document_says(live: Live, more: dict[str, Any]) -> None:
    for ask in (ASK, THINK, {**ASK, **THINK, "logprobs": True, "return_token_ids": True}):
        text = live.post(CHAT, json={**ask, **more}).text
        events = [e.removeprefix("data: ") for e in text.split("\n\n")[:-2]] if more else [text]
        for event in events:
            shape = answers.ChatChunk if more else answers.ChatAnswer
            shape.model_validate_json(event, extra="forbid")


def test_reasoning_is_told_apart_and_counted(live: Live) -> None:
    whole = live.post(CHAT, json={**THINK, "return_token_ids": True}).json()
    (choice,) = whole["choices"]
    message, tokens = choice["message"], choice["token_ids"]
    assert message["reasoning"] == message["reasoning_content"] != ""
    assert message["content"] == "17 + 25 = 42" and "<" not in message["reasoning"]
    tokenizer = live.front.service.inputs.tokenizer
    thought = next(n for n in range(len(tokens)) if "</think>" in tokenizer.decode(tokens[: n + 1]))
    opening = next(n for n in range(len(tokens)) if "<think>" in tokenizer.decode(tokens[: n + 1]))
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": thought - opening}
    hidden = live.post(CHAT, json={**THINK, "include_reasoning": False}).json()["choices"][0]["message"]
    assert hidden == {"role": "assistant", "content": "17 + 25 = 42", "refusal": None}
    stream = live.post(CHAT, json={**THINK, "include_reasoning": False, "stream": True}).text
    assert "reasoning" not in stream
    off = live.post(CHAT, json={**THINK, "reasoning_effort": "none"}).json()
    assert "reasoning" not in off["choices"][0]["message"]


def test_reasoning_ends_within_its_budget(live: Live, client: openai.OpenAI) -> None:
    whole = live.post(CHAT, json=THINK).json()["choices"][0]["message"]["reasoning"]
    ask = {**THINK, "extra_body": {"thinking_token_budget": 12}}
    answer = client.chat.completions.create(**ask)
    (choice,) = answer.choices
    reasoning = choice.message.model_extra["reasoning"]
    assert whole.startswith(reasoning.strip()) and len(reasoning) < len(whole) / 2
    assert choice.message.content.startswith("17 + 25") and choice.finish_reason == "stop"
    assert 12 <= answer.usage.completion_tokens_details.reasoning_tokens <= 12 + 3
    found = joined(list(client.chat.completions.create(**ask, stream=True)))
    assert (found["reasoning"], found["content"]) == (reasoning, choice.message.content)
    for effort, budget in (("none", 12), ("high", 0)):
        short = live.post(
            CHAT, json={**THINK, "reasoning_effort": effort, "thinking_token_budget": budget}
        ).json()
        message = short["choices"][0]["message"]
        assert not message.get("reasoning", "").strip() and message["content"].startswith("17 + 25")


def test_thinking_that_is_cut_off_is_all_reasoning(live: Live) -> None:
    cut = live.post(CHAT, json={**THINK, "max_tokens": 8}).json()["choices"][0]
    assert cut["finish_reason"] == "length"
    assert cut["message"]["content"] is None and cut["message"]["reasoning"]


def test_reasoning_of_earlier_turns_goes_into_the_prompt(live: Live) -> None:
    def prompt_tokens(**more: str) -> int:
        call = {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
        turns = [*PARIS, {"role": "assistant", "tool_calls": [call], **more}]
        turns.append({"role": "tool", "tool_call_id": "a", "content": "sunny"})
        answer = live.post(CHAT, json={**ASK, "messages": turns, "max_tokens": 1})
        return answer.json()["usage"]["prompt_tokens"]

    assert prompt_tokens() < prompt_tokens(reasoning="I look.") == prompt_tokens(reasoning_content="I look.")


def test_a_stream_that_goes_on_elsewhere_has_the_same_calls(live: Live) -> None:
    def stream(**more: Any) -> list[dict[str, Any]]:
        body = {**ASK, "messages": BOTH, "stream": True, "return_token_ids": True, **more}
        text = live.post(CHAT, json=body, headers={"X-Request-Id": "broken"}).text
        return [json.loads(event.removeprefix("data: "))["choices"][0] for event in text.split("\n\n")[:-2]]

    def told(choices: list[dict[str, Any]]) -> str:
        calls = [call for choice in choices for call in choice["delta"].get("tool_calls", ())]
        return "".join(
            c.get("id", "") + c["function"].get("name", "") + c["function"]["arguments"] for c in calls
        )

    whole = stream()
    tokens = [token for choice in whole for token in choice.get("token_ids", ())]
    for had in (1, len(tokens) // 3, len(tokens) // 2, len(tokens) - 1):
        rest = told(stream(resume={"choices": [{"index": 0, "token_ids": tokens[:had]}]}))
        assert told(whole).endswith(rest)
        assert had > 1 or rest == told(whole)


def test_tokens_of_a_conversation_count_its_tools(live: Live) -> None:
    def count(**more: object) -> int:
        return live.post("/tokenize", json={"messages": PARIS, **more}).json()["count"]

    tokens = live.post(CHAT, json={**ASK, "max_tokens": 1}).json()["usage"]["prompt_tokens"]
    assert count() < count(tools=[WEATHER]) == tokens


def test_a_server_that_reads_nothing_gives_text(unread: Live) -> None:
    def ask(body: dict[str, Any]) -> httpx.Response:
        return unread.post(CHAT, json=body)

    refused = ask(ASK)
    assert refused.status_code == 400 and "--tool-call-parser" in refused.json()["error"]["message"]
    refused = ask({**THINK, "thinking_token_budget": 5}).json()["error"]
    assert refused["param"] == "thinking_token_budget" and "--reasoning-parser" in refused["message"]
    messages = {"model": "demo", "messages": SUM, "max_tokens": 9, "thinking": {"type": "enabled"}}
    messages["thinking"]["budget_tokens"] = 5  # which its clients always send
    (warning,) = unread.post("/v1/messages", json=messages).json()["warnings"]
    assert "'thinking.budget_tokens' has no effect" in warning
    thought = ask(THINK).json()
    assert thought["choices"][0]["message"]["content"].startswith("<think>")
    assert "completion_tokens_details" not in thought["usage"]
