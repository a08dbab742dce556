"""Responses that the server keeps: gone on with, asked for, deleted, cancelled, and only by who made them."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from quire.errors import ConfigError
from quire.server.openai import answers
from quire.server.openai.store import Store
from quire.server.settings import ServerSettings
from tests.server.conftest import FRANCE, PARIS, InProcess, Live, serving
from tests.server.test_responses import ASK, BOTH, PATH, QUESTION, SUM

NUMBERS = {"type": "array", "items": {"type": "integer"}, "minItems": 900}
LONG: dict[str, Any] = {
    "model": "demo",
    "input": FRANCE,
    "reasoning": {"effort": "none"},
    "text": {"format": {"type": "json_schema", "name": "numbers", "schema": NUMBERS}},
    "background": True,
}
ANN, BEN = "ann-key", "ben-key"


@pytest.fixture(scope="module")
def keeping(service: InProcess) -> Iterator[Live]:
    with serving(service, response_store_bytes=1 << 20, api_key=(ANN, BEN)) as live:
        yield live


@pytest.fixture
def client(keeping: Live) -> Iterator[openai.OpenAI]:
    with keeping.client(ANN) as client:
        yield client


@pytest.mark.parametrize("streams", [False, True])
def test_a_conversation_goes_on_from_its_last_response(client: openai.OpenAI, streams: bool) -> None:
    def answered(**more: Any) -> Any:
        if not streams:
            return client.responses.create(**{**ASK, **more})
        with client.responses.stream(**{**ASK, **more}) as stream:
            return stream.get_final_response()

    first = answered()
    (call,) = first.output
    result = {
        "type": "function_call_output",
        "call_id": call.call_id,
        "output": '{"condition": "sunny", "temperature": 21}',
    }
    second = answered(input=[result], previous_response_id=first.id)
    whole = client.responses.create(
        **{**ASK, "input": [*QUESTION, call.model_dump(), result], "store": False}
    )
    assert second.output_text == whole.output_text and "21" in second.output_text
    assert second.usage.input_tokens == whole.usage.input_tokens
    assert second.previous_response_id == first.id
    third = answered(input=BOTH, previous_response_id=second.id)
    assert {item.type for item in third.output} == {"function_call"}
    read = client.responses.input_items.list(third.id, order="asc").data
    assert [item.type for item in read] == [
        *("message", "function_call", "function_call_output", "message", "message")
    ]
    assert [item.id for item in read][1] == call.id and len({item.id for item in read}) == 5


def test_a_response_is_given_again_until_it_is_deleted(client: openai.OpenAI, keeping: Live) -> None:
    made = client.responses.create(**{**ASK, "input": SUM, "metadata": {"a": "b"}})
    assert made.store and client.responses.retrieve(made.id) == made
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError, match="deleted"):
        client.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError) as gone:
        client.responses.create(**ASK, previous_response_id=made.id)
    assert (gone.value.code, gone.value.param) == ("previous_response_not_found", "previous_response_id")


def test_what_is_not_to_be_kept_is_not(client: openai.OpenAI) -> None:
    made = client.responses.create(**ASK, store=False)
    assert made.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_tenants_find_only_their_own(keeping: Live, client: openai.OpenAI) -> None:
    made = client.responses.create(**ASK)
    with keeping.client(BEN) as other:
        for ask in (
            lambda: other.responses.retrieve(made.id),
            lambda: other.responses.delete(made.id),
            lambda: other.responses.cancel(made.id),
            lambda: other.responses.input_items.list(made.id),
            lambda: other.responses.create(**ASK, previous_response_id=made.id),
        ):
            with pytest.raises(openai.NotFoundError):
                ask()
        same = {"x-request-id": made.id.removeprefix("resp_")}  # nor do they put theirs in its place
        assert other.responses.create(**{**ASK, "input": FRANCE}, extra_headers=same).id == made.id
    assert client.responses.retrieve(made.id) == made


def test_items_are_listed_in_pages(client: openai.OpenAI) -> None:
    turns = [{"role": role, "content": f"{n}"} for n in range(3) for role in ("user", "assistant")]
    made = client.responses.create(model="demo", input=[*turns, *FRANCE], max_output_tokens=1)
    page = client.responses.input_items.list(made.id, limit=3)
    assert page.has_more and [item.content[0].text for item in page.data][1:] == ["2", "2"]
    assert [item.content[0].text for item in page] == [FRANCE[0]["content"], *"221100"]


def test_a_response_in_the_background_is_asked_for(client: openai.OpenAI, keeping: Live) -> None:
    begun = client.responses.create(model="demo", input=FRANCE, temperature=0, background=True)
    assert (begun.status, begun.background, begun.output) == ("queued", True, [])
    keeping.until_calls(0)
    while (found := client.responses.retrieve(begun.id)).status in ("queued", "in_progress"):
        pass
    assert (found.status, found.output_text) == ("completed", PARIS)
    assert client.responses.cancel(begun.id) == found, "it has ended before"
    further = client.responses.create(**ASK, previous_response_id=begun.id)
    assert further.output[0].type == "function_call"


@pytest.mark.parametrize("how", ["cancel", "delete"])
def test_a_response_in_the_background_is_stopped(
    client: openai.OpenAI, keeping: Live, service: InProcess, how: str
) -> None:
    begun = client.responses.create(**LONG)
    keeping.until_calls(1)
    with pytest.raises(openai.BadRequestError, match="still runs"):
        client.responses.create(**ASK, previous_response_id=begun.id)
    if how == "cancel":
        assert client.responses.cancel(begun.id).status == "cancelled"
        assert client.responses.retrieve(begun.id).status == "cancelled"
    else:
        client.responses.delete(begun.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(begun.id)
    keeping.until_calls(0)
    assert service.num_used_blocks() == 0


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("{}?stream=true", 501, "leave stream out"),
        ("{}/input_items?limit=0", 400, "from 1 to 100"),
        ("{}/input_items?order=up", 400, "asc or desc"),
        ("{}/input_items?after=x", 400, "id of an item"),
    ],
)
def test_what_cannot_be_shown_says_so(
    client: openai.OpenAI, keeping: Live, path: str, status: int, words: str
) -> None:
    made = client.responses.create(**ASK)
    answer = keeping.get(f"{PATH}/{path.format(made.id)}", headers={"x-api-key": ANN})
    assert (answer.status_code, words in answer.json()["error"]["message"]) == (status, True), answer.text


def test_what_is_in_no_background_cannot_be_cancelled(client: openai.OpenAI) -> None:
    made = client.responses.create(**ASK)
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(made.id)
    with pytest.raises(openai.BadRequestError, match="store is false"):
        client.responses.create(**ASK, background=True, store=False)
    with pytest.raises(openai.InternalServerError, match="leave stream out"):
        client.responses.create(**ASK, background=True, stream=True)
    with pytest.raises(openai.BadRequestError, match="X-Request-Timeout"):
        client.responses.create(**ASK, background=True, extra_headers={"x-request-timeout": "soon"})


def test_answers_are_as_documented(client: openai.OpenAI, keeping: Live) -> None:
    made, key = client.responses.create(**ASK), {"x-api-key": ANN}
    for path, shape in (("", answers.ResponseAnswer), ("/input_items", answers.ResponseItems)):
        shape.model_validate(keeping.get(f"{PATH}/{made.id}{path}", headers=key).json(), extra="forbid")


def test_the_least_recently_used_goes_first() -> None:
    store, answer = Store(300), {"text": "x" * 80}
    for name in "abc":
        assert store.keep(("", name), [], answer)
    store.find(("", "a"))
    assert store.keep(("", "d"), [], answer)
    assert [name for name in "abcd" if ("", name) in store._kept] == ["a", "c", "d"]
    assert not store.keep(("", "e"), [], {"text": "x" * 300}) and len(store._kept) == 3
    assert store.keep(("", "a"), [], {}) and store.num_bytes == len("[[],{}]") + 2 * (
        len('[[],{"text":""}]') + 80
    )


def test_one_without_room_says_so(service: InProcess) -> None:
    with serving(service, response_store_bytes=1 << 9) as live, live.client() as client:
        made = client.responses.create(**ASK)
        assert not made.store and "no room" in made.model_extra["warnings"][-1]
        with pytest.raises(openai.InternalServerError, match="no room"):
            client.responses.create(**ASK, background=True)


def test_processes_that_share_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="api_server_count"):
        ServerSettings(response_store_bytes=1, api_server_count=2)
