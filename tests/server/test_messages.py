"""Anthropic's client talks to the demo model: tools, thinking and errors, streamed or not, over several turns."""

import json
import re
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import pytest

from quire.server.anthropic import answers
from quire.server.anthropic.blocks import Blocks, conversation
from quire.text.tools.events import ArgumentsDelta, CallBegins, CallEnds, TextDelta
from tests.server.conftest import FRANCE, PARIS, InProcess, Live, serving

PATH = "/v1/messages"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "get_weather", "input_schema": CITY}
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
BOTH = [{"role": "user", "content": "What is the weather in Paris and in Oslo?"}]
SUM = [{"role": "user", "content": "What is 17 + 25?"}]
ASK: dict[str, Any] = {
    "model": "demo",
    "messages": QUESTION,
    "tools": [WEATHER],
    "max_tokens": 200,
}
THINK = {**ASK, "messages": SUM, "tools": [], "thinking": {"type": "enabled", "budget_tokens": 1024}}
BILLING = "x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch={};"


def client_of(live: Live, **options: Any) -> anthropic.Anthropic:
    http = httpx2.Client(timeout=60, limits=httpx2.Limits(max_keepalive_connections=0))
    given = {"api_key": "none", **options}
    return anthropic.Anthropic(base_url=live.url, max_retries=0, http_client=http, **given)


@pytest.fixture
def client(live: Live) -> Iterator[anthropic.Anthropic]:
    with client_of(live) as client:
        yield client


def without_ids(message: Any) -> dict[str, Any]:
    found = message.model_dump()
    for name in ("id", "usage"):
        del found[name]
    for block in found["content"]:
        block.pop("id", None)
    return found


def test_a_call_is_answered_over_several_turns(client: anthropic.Anthropic) -> None:
    first = client.messages.create(**ASK)
    (call,) = first.content
    assert first.stop_reason == "tool_use" and first.stop_sequence is None
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Paris"})
    result = {
        "type": "tool_result",
        "tool_use_id": call.id,
        "content": [{"type": "text", "text": '{"condition": "sunny", "temperature": 21}'}],
    }
    turns = [
        *QUESTION,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]
    second = client.messages.create(**{**ASK, "messages": turns})
    (text,) = second.content
    assert second.stop_reason == "end_turn" and text.type == "text"
    assert "21" in text.text and "sunny" in text.text
    turns += [{"role": "assistant", "content": second.content}, BOTH[0]]
    third = client.messages.create(**{**ASK, "messages": turns})
    assert third.stop_reason == "tool_use" and third.usage.cache_read_input_tokens > 0


@pytest.mark.parametrize("messages", [QUESTION, BOTH, FRANCE, SUM])
def test_streams_say_the_same(client: anthropic.Anthropic, messages: list[dict[str, Any]]) -> None:
    ask = {**ASK, "messages": messages, "thinking": {"type": "adaptive"}}
    whole = client.messages.create(**ask)
    with client.messages.stream(**ask) as stream:
        final = stream.get_final_message()
    assert without_ids(final) == without_ids(whole)
    assert final.usage.output_tokens == whole.usage.output_tokens > 0


def test_events_come_in_order(live: Live) -> None:
    text = live.post(f"{PATH}?beta=true", json={**ASK, "messages": BOTH, "stream": True}).text
    assert "[DONE]" not in text
    events = [event.split("\n") for event in text.removesuffix("\n\n").split("\n\n")]
    bodies = [json.loads(data.removeprefix("data: ")) for _, data in events]
    assert [name.removeprefix("event: ") for name, _ in events] == [body["type"] for body in bodies]
    for body in bodies:
        answers.MessagesEvent.model_validate(body, extra="forbid")
    kinds = [body["type"] for body in bodies if body["type"] != "content_block_delta"]
    block = ["content_block_start", "content_block_stop"]
    assert kinds == ["message_start", "ping", *block, *block, "message_delta", "message_stop"]
    assert [body["index"] for body in bodies if body["type"] == "content_block_stop"] == [0, 1]
    assert bodies[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert bodies[0]["message"]["usage"]["output_tokens"] == 0 < bodies[-2]["usage"]["output_tokens"]


def test_thinking_is_a_block_of_its_own_and_comes_back(live: Live, client: anthropic.Anthropic) -> None:
    answer = client.messages.create(**THINK)
    thought, text = answer.content
    assert (thought.type, text.type, text.text) == ("thinking", "text", "17 + 25 = 42")
    assert thought.thinking and thought.signature and "<" not in thought.thinking
    hidden = client.messages.create(**{**THINK, "thinking": {"type": "enabled", "display": "omitted"}})
    assert [block.type for block in hidden.content] == ["text"]
    off = client.messages.create(**{**THINK, "thinking": {"type": "disabled"}})
    assert [block.type for block in off.content] == ["text"]
    answers.Message.model_validate(live.post(PATH, json=THINK).json(), extra="forbid")

    def count(*blocks: dict[str, Any]) -> int:
        use = {"type": "tool_use", "id": "a", "name": "get_weather", "input": {}}
        result = {"type": "tool_result", "tool_use_id": "a", "content": "sunny"}
        turns = [*QUESTION, {"role": "assistant", "content": [*blocks, use]}]
        turns.append({"role": "user", "content": [result]})
        return client.messages.count_tokens(model="demo", messages=turns, tools=[WEATHER]).input_tokens

    assert count() < count({"type": "thinking", "thinking": "I look.", "signature": "any"})


def test_thinking_ends_within_its_budget(client: anthropic.Anthropic) -> None:
    asked = {**THINK, "thinking": {"type": "enabled", "budget_tokens": 12}}
    thought, text = client.messages.create(**asked).content
    assert (thought.type, text.type) == ("thinking", "text") and text.text.startswith("17 + 25")
    whole = client.messages.create(**THINK).content[0].thinking
    assert whole.startswith(thought.thinking.strip()) and len(thought.thinking) < len(whole) / 2
    with client.messages.stream(**asked) as stream:
        found = stream.get_final_message()
    assert [block.model_dump() for block in found.content] == [thought.model_dump(), text.model_dump()]
    off = client.messages.create(**{**asked, "thinking": {"type": "disabled", "budget_tokens": 12}})
    assert [block.type for block in off.content] == ["text"]


def test_why_it_stops(client: anthropic.Anthropic) -> None:
    cut = client.messages.create(**{**ASK, "messages": FRANCE, "max_tokens": 3})
    assert cut.stop_reason == "max_tokens" and cut.usage.output_tokens == 3
    stopped = client.messages.create(**{**ASK, "messages": FRANCE, "stop_sequences": [" is"]})
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " is")
    assert stopped.content[0].text == "The capital of France"
    one = {"type": "auto", "disable_parallel_tool_use": True}
    assert len(client.messages.create(**{**ASK, "messages": BOTH}).content) == 2
    assert len(client.messages.create(**{**ASK, "messages": BOTH}, tool_choice=one).content) == 1
    none = client.messages.create(**ASK, tool_choice={"type": "none"})
    assert none.stop_reason == "end_turn"


def test_an_answer_that_is_begun_is_gone_on_with(client: anthropic.Anthropic) -> None:
    begun = [*FRANCE, {"role": "assistant", "content": "The capital of France"}]
    answer = client.messages.create(**{**ASK, "messages": begun, "tools": []})
    assert answer.content[0].text.strip() == "is Paris."


def test_tokens_are_counted_as_they_are_read(client: anthropic.Anthropic) -> None:
    ask = {name: ASK[name] for name in ("model", "messages", "tools")}
    answer = client.messages.create(**ASK, system="Be brief.")
    counted = client.messages.count_tokens(**ask, system=[{"type": "text", "text": "Be brief."}])
    usage = answer.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    assert usage.cache_creation_input_tokens == 0
    assert sum(usage.cache_missed_input_tokens.values()) == usage.input_tokens


def test_a_line_that_changes_each_time_is_left_out(service: InProcess, client: anthropic.Anthropic) -> None:
    def count(client: anthropic.Anthropic, *system: str) -> int:
        blocks = [{"type": "text", "text": text} for text in system]
        return client.messages.count_tokens(model="demo", messages=FRANCE, system=blocks).input_tokens

    line = BILLING.format("fa690")
    plain = count(client, "You are a clerk.")
    assert count(client, line, "You are a clerk.") == count(client, f"{line}\nYou are a clerk.") == plain
    assert count(client, f"You are a clerk.\n{line}") > plain
    with serving(service, keep_volatile_lines=True) as keeping, client_of(keeping) as other:
        assert count(other, line, "You are a clerk.") > plain == count(other, "You are a clerk.")


def test_what_is_not_known_is_named(live: Live) -> None:
    tools = [{"type": "web_search_20250305", "name": "web_search"}, {**WEATHER, "strict": True}]
    blocks = [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": PARIS}]
    turns = [*FRANCE, {"role": "assistant", "content": blocks}, *QUESTION]
    ask = {**ASK, "tools": tools, "messages": turns, "metadata": {"user_id": "u"}, "speed": "fast"}
    answer = live.post(PATH, json=ask).json()
    assert answer["stop_reason"] == "tool_use"
    assert [warning.partition(";")[0].partition(",")[0] for warning in answer["warnings"]] == [
        "'speed' is not a known field",
        "tools of type 'web_search_20250305' are not known",
        "'strict' of a tool has no effect",
        "messages[1].content[0] is a block of type 'redacted_thinking'",
    ]
    events = live.post(PATH, json={**ask, "stream": True}).text
    started = json.loads(events.partition("data: ")[2].partition("\n")[0])
    assert started["message"]["warnings"] == answer["warnings"]


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
USE = {"type": "tool_use", "id": "a", "name": "get_weather", "input": {}}


@pytest.mark.parametrize(
    ("more", "status", "kind", "words"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
        ({"temperature": 3}, 400, "invalid_request_error", "from 0 to 2"),
        ({"model": "other"}, 404, "not_found_error", "there is no model 'other'"),
        ({"tool_choice": {"type": "tool", "name": "x"}}, 400, "invalid_request_error", "one of the tools"),
        ({"tool_choice": {"type": "all"}}, 400, "invalid_request_error", "auto, any, tool or none"),
        ({"thinking": {"type": "maybe"}}, 400, "invalid_request_error", "thinking.type"),
        (
            {"thinking": {"type": "enabled", "budget_tokens": -1}},
            400,
            "invalid_request_error",
            "budget_tokens",
        ),
        (
            {"output_config": {"format": {"type": "json_schema"}}},
            400,
            "invalid_request_error",
            "output_config.format",
        ),
        ({"output_config": {"effort": "all"}}, 400, "invalid_request_error", "output_config.effort"),
        ({"tools": [{"name": "x"}]}, 400, "invalid_request_error", "tools[0].input_schema"),
        ({"messages": []}, 400, "invalid_request_error", "at least one message"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, 400, "invalid_request_error", "reads text"),
        ({"messages": [{"role": "user", "content": [USE]}]}, 400, "invalid_request_error", "'tool_use'"),
        (
            {"messages": [*FRANCE, {"role": "assistant", "content": [USE]}]},
            400,
            "invalid_request_error",
            "tool_res",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_request_error", "messages[0].role"),
        ({"messages": [{"role": "user", "content": 7}]}, 400, "invalid_request_error", "list of blocks"),
    ],
)
def test_refusals_have_anthropics_shape(
    live: Live, more: dict[str, Any], status: int, kind: str, words: str
) -> None:
    answer = live.post(PATH, json={**ASK, **more})
    assert answer.status_code == status
    answers.MessagesError.model_validate(answer.json(), extra="forbid")
    assert answer.json()["error"]["type"] == kind and words in answer.json()["error"]["message"]


@pytest.mark.parametrize("words", [3000, 100_000])
def test_agents_know_a_full_context_by_the_words(live: Live, words: int) -> None:
    ask = {"messages": [{"role": "user", "content": "word " * words}], "max_tokens": 9}
    message = live.post(PATH, json=ask).json()["error"]["message"]
    found = re.search(r"prompt is too long[^0-9]*(\d+) tokens > (\d+)", message)
    assert found and int(found[1]) > int(found[2]) == 2047


def test_what_cannot_be_done_is_not_tried_again(live: Live) -> None:
    sent: list[Any] = []
    http = httpx2.Client(timeout=60, event_hooks={"request": [sent.append]})
    ask = {**ASK, "extra_body": {"container": "x"}}
    with (
        anthropic.Anthropic(base_url=live.url, max_retries=2, http_client=http, api_key="none") as client,
        pytest.raises(anthropic.InternalServerError, match="container: this server cannot do it yet"),
    ):
        client.messages.create(**ask)
    assert len(sent) == 1


def test_an_image_of_a_tools_is_no_end_of_the_conversation(live: Live) -> None:
    result = {
        "type": "tool_result",
        "tool_use_id": "a",
        "content": [IMAGE, {"type": "text", "text": "1 x 1"}],
    }
    turns = [*QUESTION, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [result]}]
    answer = live.post(PATH, json={**ASK, "messages": turns, "max_tokens": 4})
    assert answer.json()["warnings"] == [
        "messages[2].content[0].content[0]: image cannot be read; the model is told so"
    ]
    told: list[str] = []
    assert conversation(turns, None, told)[-1]["content"] == "[image: it cannot be read here]\n1 x 1"


def test_keys_come_in_either_header(service: InProcess) -> None:
    with serving(service, api_key=("sesame",)) as live:
        for given in ({"api_key": "sesame"}, {"api_key": None, "auth_token": "sesame"}):
            with client_of(live, **given) as client:
                assert client.messages.create(**ASK).stop_reason == "tool_use"
        with (
            client_of(live, api_key="wrong") as client,
            pytest.raises(anthropic.AuthenticationError) as found,
        ):
            client.messages.create(**ASK)
        assert found.value.body["error"]["type"] == "authentication_error"
        both = {"authorization": "Bearer wrong", "x-api-key": "sesame"}
        assert live.post(PATH, json=ASK, headers=both).status_code == 401
        assert (
            live.post("/v1/nothing", headers={"x-api-key": "sesame"}).json()["error"]["type"]
            == "NotFoundError"
        )


def test_arguments_that_break_off_are_shown_as_they_are() -> None:
    blocks = Blocks(shows_thinking=True)
    events = blocks.take(
        [TextDelta("a"), TextDelta("b"), CallBegins(0, "id", "f"), ArgumentsDelta(0, '{"x": ')]
    )
    events += blocks.take([CallEnds(0)])
    assert blocks.content[0] == {"type": "text", "text": "ab"}
    assert blocks.content[1]["input"] == {"INVALID_JSON": '{"x": '}
    assert [event["index"] for event in events] == [0, 0, 0, 0, 1, 1, 1]


def test_a_stream_that_goes_on_elsewhere_adds_up_to_the_same(live: Live) -> None:
    def stream(**more: Any) -> str:
        body = {**ASK, "messages": BOTH, "stream": True, **more}
        headers = {"X-Request-Id": "broken", "x-engine-resumable": "1"}
        return live.post(PATH, json=body, headers=headers).text

    pieces = stream().split("\n\n")
    cut = next(n for n, piece in enumerate(pieces) if piece.startswith(": tokens") and n > 10)
    told = [json.loads(p.removeprefix(": tokens ")) for p in pieces[: cut + 1] if p.startswith(": tokens")]
    tokens = [token for _, choices, _ in told for _, some, _ in choices for token in some]
    (((_, cached, missed),),) = (prompts for _, _, prompts in told if prompts)
    prompt = {"index": 0, "cached_tokens": cached, "missed_tokens": missed}
    resume = {"choices": [{"index": 0, "token_ids": tokens}], "prompts": [prompt]}
    rest = stream(resume=resume).split("\n\n")

    def deltas(pieces: list[str]) -> str:
        events = [json.loads(p.partition("data: ")[2]) for p in pieces if p.startswith("event:")]
        return "".join(e["delta"].get("partial_json", "") for e in events if "delta" in e)

    assert deltas(pieces[:cut]) + deltas(rest) == deltas(pieces)
    (usage,) = (json.loads(p.partition("data: ")[2])["usage"] for p in rest if "message_delta" in p)
    assert (usage["cache_read_input_tokens"], usage["cache_missed_input_tokens"]) == (cached, missed)
    assert "message_start" not in "".join(rest) and rest[-3].startswith("event: message_stop")
