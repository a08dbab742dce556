"""Responses that the server keeps: gone on with, asked for, deleted, cancelled, and only by who made them."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from quire.errors import ConfigError
from quire.server.openai import answers
from quire.server.openai.store import Store
from quire.server.settings import ServerSettings
from tests.server.conftest import FRANCE, InProcess, Live, serving
from tests.server.test_responses import ASK, BOTH, PATH, QUESTION, SUM

ANN, BEN = "ann-key", "ben-key"
KEY = {"x-api-key": ANN}


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
            lambda: other.responses.create(**ASK, previous_response_id=made.id),
        ):
            with pytest.raises(openai.NotFoundError):
                ask()
        same = {"x-request-id": made.id.removeprefix("resp_")}  # nor do they put theirs in its place
        assert other.responses.create(**{**ASK, "input": FRANCE}, extra_headers=same).id == made.id
    assert client.responses.retrieve(made.id) == made


def test_a_response_is_answered_as_documented(client: openai.OpenAI, keeping: Live) -> None:
    made = client.responses.create(**ASK)
    url = f"{PATH}/{made.id}"
    answers.ResponseAnswer.model_validate(keeping.get(url, headers=KEY).json(), extra="forbid")
    answer = keeping.get(f"{url}?stream=true", headers=KEY)
    assert answer.status_code == 501 and "leave stream out" in answer.json()["error"]["message"]


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


def test_processes_that_share_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="api_server_count"):
        ServerSettings(response_store_bytes=1, api_server_count=2)
