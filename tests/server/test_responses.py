"""OpenAI's client has responses of the demo model: tools and reasoning, streamed or not, over several turns."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from quire.server.openai import answers
from tests.grammar.test_structured import SCHEMA, check
from tests.server.conftest import FRANCE, PARIS, Live

PATH = "/v1/responses"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "get_weather", "parameters": CITY}
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
BOTH = [{"role": "user", "content": "What is the weather in Paris and in Oslo?"}]
SUM = [{"role": "user", "content": "What is 17 + 25?"}]
ASK: dict[str, Any] = {"model": "demo", "input": QUESTION, "tools": [WEATHER], "temperature": 0}


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with live.client() as client:
        yield client


def told(response: Any) -> list[dict[str, Any]]:
    """What the items say, without ids."""
    found = [item.model_dump(exclude={"id", "call_id"}) for item in response.output]
    assert len({item.id for item in response.output}) == len(found)
    return found


def test_a_call_is_answered_over_several_turns(client: openai.OpenAI) -> None:
    first = client.responses.create(**ASK)
    (call,) = first.output
    assert (first.status, call.type, call.name) == ("completed", "function_call", "get_weather")
    assert json.loads(call.arguments) == {"city": "Paris"}
    result = '{"condition": "sunny", "temperature": 21}'
    output = {"type": "function_call_output", "call_id": call.call_id, "output": result}
    turns = [*QUESTION, *(item.model_dump() for item in first.output), output]
    second = client.responses.create(**{**ASK, "input": turns})
    assert "21" in second.output_text and "sunny" in second.output_text
    read = second.usage.input_tokens_details
    assert 0 < read.cached_tokens < second.usage.input_tokens
    assert read.cached_tokens + sum(read.missed_tokens.values()) == second.usage.input_tokens
    turns += [*(item.model_dump() for item in second.output), *BOTH]
    third = client.responses.create(**{**ASK, "input": turns})
    assert {item.type for item in third.output} == {"function_call"}


@pytest.mark.parametrize("messages", [QUESTION, BOTH, FRANCE, SUM])
def test_streams_say_the_same(client: openai.OpenAI, messages: list[dict[str, Any]]) -> None:
    ask = {**ASK, "input": messages, "reasoning": {"effort": "high"}}
    whole = client.responses.create(**ask)
    events = list(client.responses.create(**ask, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    final = events[-1].response
    assert events[-1].type == "response.completed" and told(final) == told(whole)
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.usage.output_tokens_details == whole.usage.output_tokens_details
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == final.output
    for item in final.output:
        pieces = "".join(getattr(e, "delta", "") for e in events if getattr(e, "item_id", "") == item.id)
        assert pieces == (item.arguments if item.type == "function_call" else item.content[0].text)
    with client.responses.stream(**ask) as stream:
        assert stream.get_final_response().output_text == whole.output_text


def test_reasoning_is_an_item_and_counted(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="demo", input=SUM, temperature=0, reasoning={"effort": "high"})
    thought, text = answer.output
    assert (thought.type, text.type, answer.output_text) == ("reasoning", "message", "17 + 25 = 42")
    assert thought.content[0].text and answer.usage.output_tokens_details.reasoning_tokens > 0
    off = client.responses.create(model="demo", input=SUM, temperature=0, reasoning={"effort": "none"})
    assert [item.type for item in off.output] == ["message"]


def test_reasoning_ends_within_its_budget(client: openai.OpenAI) -> None:
    ask = {"model": "demo", "input": SUM, "temperature": 0, "reasoning": {"effort": "high"}}
    answer = client.responses.create(**ask, extra_body={"thinking_token_budget": 12})
    thought, message = answer.output
    assert (thought.type, message.type) == ("reasoning", "message") and answer.output_text
    assert 12 <= answer.usage.output_tokens_details.reasoning_tokens <= 12 + 3


def test_instructions_and_developers_are_one_system_prompt(live: Live, client: openai.OpenAI) -> None:
    developer = {"role": "developer", "content": [{"type": "input_text", "text": "Be kind."}]}
    both = client.responses.create(model="demo", instructions="Be brief.", input=[developer, *FRANCE])
    system = [{"role": "system", "content": "Be brief.\n\nBe kind."}, *FRANCE]
    chat = client.chat.completions.create(model="demo", messages=system)
    assert both.usage.input_tokens == chat.usage.prompt_tokens and both.instructions == "Be brief."
    assert (
        client.responses.create(model="demo", input=FRANCE[0]["content"], temperature=0).output_text == PARIS
    )


def test_an_answer_that_is_cut_off_is_incomplete(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "demo", "input": FRANCE, "max_output_tokens": 3}
    whole = client.responses.create(**ask)
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert list(client.responses.create(**ask, stream=True))[-1].type == "response.incomplete"


def test_what_is_not_known_is_named(live: Live) -> None:
    items = [*QUESTION, {"type": "web_search_call", "id": "ws"}]
    more = {"tools": [{"type": "web_search"}, WEATHER], "input": items, "store": True, "speed": 1}
    more |= {"truncation": "auto", "reasoning": {"summary": "auto"}}
    answer = live.post(PATH, json={**ASK, **more}).json()
    answers.ResponseAnswer.model_validate(answer, extra="forbid")
    assert [warning.partition(";")[0].partition(",")[0] for warning in answer["warnings"]] == [
        "'speed' is not a known field",
        "'truncation' has no effect on this server",
        "'reasoning.summary' has no effect on this server",
        "tools of type 'web_search' are not known",
        "input[1] is of type 'web_search_call'",
        "'store' has no effect on this server: it keeps none (--response-store-bytes)",
    ]
    assert answer["output"][0]["type"] == "function_call"


@pytest.mark.parametrize("streams", [False, True])
def test_a_text_is_of_the_form_that_was_asked_for(client: openai.OpenAI, streams: bool) -> None:
    form = {"type": "json_schema", "name": "pet", "schema": SCHEMA, "strict": True}
    ask: dict[str, Any] = {"model": "demo", "input": FRANCE, "text": {"format": form}}
    more = {"reasoning": {"effort": "none"}, "max_output_tokens": 300}
    if streams:
        with client.responses.stream(**ask, **more) as stream:
            answer = stream.get_final_response()
    else:
        answer = client.responses.create(**ask, **more)
    check(answer.output_text)
    assert (answer.text.format.type, answer.text.format.name) == ("json_schema", "pet")


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [
        ({"previous_response_id": "resp_1"}, 404, "start it with --response-store-bytes"),
        ({"background": True}, 501, "keeps no responses"),
        ({"conversation": "conv_1"}, 501, "use previous_response_id"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, 400, "send the item itself"),
        ({"tool_choice": "required", "tools": []}, 400, "there are no tools"),
        ({"text": {"format": {"type": "json_schema"}}}, 400, "text.format"),
        ({"text": {"format": {"type": "xml"}}}, 400, "text.format.type"),
        ({"text": {"format": "json"}}, 400, "text.format"),
        ({"reasoning": {"effort": "all"}}, 400, "reasoning.effort"),
        ({"input": []}, 400, "at least one message"),
        ({"input": [{"role": "robot", "content": ""}]}, 400, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "reads text"),
        ({"input": [{"type": "function_call", "name": "x"}]}, 400, "call_id"),
        ({"tools": [{"type": "function"}]}, 400, "name"),
        ({"max_output_tokens": 0}, 400, "max_tokens"),
        ({"stream": True, "resume": {"choices": []}}, 400, "cannot go on"),
    ],
)
def test_what_cannot_be_done_says_so(live: Live, more: dict[str, Any], status: int, words: str) -> None:
    answer = live.post(PATH, json={**ASK, **more})
    assert (answer.status_code, words in answer.json()["error"]["message"]) == (status, True), answer.text


def test_an_image_of_a_tools_ends_no_conversation(client: openai.OpenAI) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}
    image = [{"type": "input_text", "text": "Here:"}, {"type": "input_image", "image_url": "data:,"}]
    result = {"type": "function_call_output", "call_id": "c", "output": image}
    answer = client.responses.create(model="demo", input=[*FRANCE, call, result])
    same = {**result, "output": "Here:\n[input_image: it cannot be read here]"}
    told = client.responses.create(model="demo", input=[*FRANCE, call, same])
    assert answer.usage.input_tokens == told.usage.input_tokens
    assert answer.model_extra["warnings"] == [
        "input[2].output[1]: input_image cannot be read; the model is told so"
    ]


def test_calls_of_custom_tools_are_read(client: openai.OpenAI) -> None:
    called = {"type": "custom_tool_call", "call_id": "c", "name": "patch", "input": "*** Begin"}
    result = {"type": "custom_tool_call_output", "call_id": "c", "output": "Done."}
    answer = client.responses.create(model="demo", input=[*FRANCE, called, result])
    function = {
        "type": "function_call",
        "call_id": "c",
        "name": "patch",
        "arguments": '{"input": "*** Begin"}',
    }
    same = client.responses.create(
        model="demo", input=[*FRANCE, function, {**result, "type": "function_call_output"}]
    )
    assert answer.usage.input_tokens == same.usage.input_tokens
    assert "warnings" not in (answer.model_extra or {})
