"""`quire serve` as OpenAI's client and curl see it: every endpoint and field, each answer's shape key by key."""

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import openai
import pytest

from quire import __version__
from quire.server.openai import answers
from tests.server.conftest import FRANCE, PARIS
from tests.server.served import Served

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ASK: dict[str, Any] = {"model": "demo", "messages": FRANCE, "temperature": 0}
STORY: dict[str, Any] = {"model": "demo", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 12}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
ALWAYS = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
SAMPLED = {"n": 3, "temperature": 1.0, "seed": 7}


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(served: Served, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(served.url + path, json=body, timeout=60)


def curl(served: Served, path: str, body: dict[str, Any] | None = None) -> str:
    """What curl prints; it fails at a status of 400 or more."""
    words = [
        "curl",
        "--silent",
        "--show-error",
        "--fail",
        "--no-buffer",
        "--max-time",
        "60",
        served.url + path,
    ]
    if body is not None:
        words += ["--header", "Content-Type: application/json", "--data", json.dumps(body)]
    return subprocess.run(words, capture_output=True, check=True, text=True).stdout


def events(text: str) -> list[str]:
    """The events of a stream before its last one, which is [DONE]."""
    *found, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") for event in found)
    return [event.removeprefix("data: ") for event in found]


def chosen(chunks: Iterable[Any], index: int) -> list[Any]:
    return [choice for chunk in chunks for choice in chunk.choices if choice.index == index]


def test_one_answer_whoever_asks(served: Served, client: openai.OpenAI) -> None:
    async def asynchronous() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as other:
            whole = await other.chat.completions.create(**ASK)
            stream = await other.chat.completions.create(**ASK, stream=True)
            parts = [chunk.choices[0].delta.content async for chunk in stream]
            return [whole.choices[0].message.content, "".join(parts)]

    whole = client.chat.completions.create(**ASK).choices[0].message.content
    streamed = "".join(c.choices[0].delta.content for c in client.chat.completions.create(**ASK, stream=True))
    with client.chat.completions.stream(**ASK) as stream:
        final = stream.get_final_completion().choices[0].message.content
    assert [whole, streamed, final, *asyncio.run(asynchronous())] == [PARIS] * 5


def test_one_text_whoever_asks(served: Served, client: openai.OpenAI) -> None:
    async def asynchronous() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as other:
            whole = await other.completions.create(**STORY)
            stream = await other.completions.create(**STORY, stream=True)
            return [whole.choices[0].text, "".join([chunk.choices[0].text async for chunk in stream])]

    whole = client.completions.create(**STORY).choices[0].text
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**STORY, stream=True))
    assert len({whole, streamed, *asyncio.run(asynchronous())}) == 1 and whole


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl_reaches_every_endpoint(served: Served) -> None:
    assert json.loads(curl(served, CHAT, ASK))["choices"][0]["message"]["content"] == PARIS
    chunks = [json.loads(event) for event in events(curl(served, CHAT, {**ASK, "stream": True}))]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == PARIS
    text = json.loads(curl(served, COMPLETIONS, STORY))["choices"][0]["text"]
    chunks = [json.loads(event) for event in events(curl(served, COMPLETIONS, {**STORY, "stream": True}))]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
    tokens = json.loads(curl(served, "/tokenize", {"prompt": text}))["tokens"]
    assert json.loads(curl(served, "/detokenize", {"tokens": tokens})) == {"prompt": text}
    (model,) = json.loads(curl(served, "/v1/models"))["data"]
    assert model == json.loads(curl(served, "/v1/models/demo"))
    assert json.loads(curl(served, "/version")) == {"version": __version__}
    assert json.loads(curl(served, "/load")) == {"server_load": 0}
    probes = ("/livez", "/readyz", "/startupz", "/health", "/ping")
    assert [curl(served, path) for path in probes] == ["ok", "ready", "started", "", ""]
    assert curl(served, "/metrics").count("vllm:generation_tokens_total") >= 1
    assert json.loads(curl(served, "/openapi.json"))["openapi"].startswith("3.")


@pytest.mark.parametrize(
    ("more", "keys"),
    [
        ({}, set()),
        (SAMPLED, set()),
        ({"logprobs": True, "top_logprobs": 2}, set()),
        ({"logprobs": None, "top_logprobs": 0, "stream": None, "echo": None, "n": None}, set()),
        ({"prompt_logprobs": 1}, {"prompt_logprobs"}),
        ({"return_token_ids": True}, {"prompt_token_ids"}),
        ({"temperatures": 1, "store": True}, {"warnings"}),
        ({"return_timing": True}, {"timing"}),
    ],
)
def test_the_shape_of_a_chat(served: Served, more: dict[str, Any], keys: set[str]) -> None:
    answer = post(served, CHAT, {**ASK, **more})
    found = answers.ChatAnswer.model_validate_json(answer.text, extra="forbid")
    always = {"id", "object", "created", "model", "choices", "system_fingerprint", "usage"}
    assert set(answer.json()) == always | keys
    assert [choice.index for choice in found.choices] == list(range(more.get("n") or 1))
    assert (found.choices[0].logprobs is not None) == bool(more.get("logprobs"))
    assert ("token_ids" in answer.json()["choices"][0]) == bool(more.get("return_token_ids"))


@pytest.mark.parametrize(
    ("more", "keys"),
    [
        ({}, set()),
        (SAMPLED, set()),
        ({"logprobs": 2}, set()),
        ({"logprobs": 2, "echo": True}, set()),
        ({"echo": None, "stream": None, "add_special_tokens": None, "suffix": None, "seed": None}, set()),
        ({"prompt_logprobs": 1}, {"prompt_logprobs"}),
        ({"return_token_ids": True}, {"prompt_token_ids", "token_ids"}),
        ({"prompt": ["Once", "The fox"], **SAMPLED}, set()),
    ],
)
def test_the_shape_of_a_completion(served: Served, more: dict[str, Any], keys: set[str]) -> None:
    answer = post(served, COMPLETIONS, {**STORY, **more})
    found = answers.CompletionAnswer.model_validate_json(answer.text, extra="forbid")
    assert set(answer.json()) == {
        *("id", "object", "created", "model"),
        *("choices", "system_fingerprint", "usage"),
    }
    prompts = len(more["prompt"]) if "prompt" in more else 1
    assert [choice.index for choice in found.choices] == list(range(prompts * (more.get("n") or 1)))
    always = {"index", "text", "logprobs", "finish_reason", "stop_reason"}
    assert all(set(choice) == always | keys for choice in answer.json()["choices"])
    assert (found.choices[0].logprobs is not None) == ("logprobs" in more)


@pytest.mark.parametrize("more", [{}, USAGE, ALWAYS, SAMPLED, {"logprobs": True, "top_logprobs": 2}])
def test_the_order_of_a_chat_stream(served: Served, more: dict[str, Any]) -> None:
    body = {**ASK, "stream": True, **more, "return_token_ids": True, "temperatures": 1}
    found = events(post(served, CHAT, body).text)
    chunks = [answers.ChatChunk.model_validate_json(event, extra="forbid") for event in found]
    assert len({(c.id, c.created, c.model, c.system_fingerprint) for c in chunks}) == 1
    assert [bool(c.warnings and c.prompt_token_ids) for c in chunks] == [True] + [False] * (len(chunks) - 1)
    if "stream_options" in more:
        last = chunks.pop()
        assert last.choices == [] and last.usage
        assert last.usage.completion_tokens == sum(len(c.token_ids or []) for c in chosen(chunks, 0))
    assert all((c.usage is not None) == (more is ALWAYS) and len(c.choices) == 1 for c in chunks)
    for index in range(more.get("n", 1)):
        first, *rest = chosen(chunks, index)
        assert (first.delta.role, first.delta.content) == ("assistant", "")
        assert all(choice.delta.role is None for choice in rest)
        assert [choice.finish_reason is not None for choice in rest] == [False] * (len(rest) - 1) + [True]
        if "logprobs" in more:
            assert all(c.logprobs and len(c.logprobs.content) == len(c.token_ids) for c in rest)


@pytest.mark.parametrize("more", [{}, USAGE, ALWAYS, SAMPLED, {"logprobs": 2, "echo": True}])
def test_the_order_of_a_completion_stream(served: Served, more: dict[str, Any]) -> None:
    ask = {**STORY, "prompt": ["Once", "The fox"], "ignore_eos": True, "temperatures": 1}
    body = {**ask, "stream": True, **more}
    found = events(post(served, COMPLETIONS, body).text)
    chunks = [answers.CompletionChunk.model_validate_json(event, extra="forbid") for event in found]
    assert [bool(c.warnings) for c in chunks] == [True] + [False] * (len(chunks) - 1)
    if "stream_options" in more:
        last = chunks.pop()
        assert last.choices == [] and last.usage and last.usage.completion_tokens == 2 * 12
    assert all((c.usage is not None) == (more is ALWAYS) and len(c.choices) == 1 for c in chunks)
    for index in range(2 * more.get("n", 1)):
        ends = [choice.finish_reason for choice in chosen(chunks, index)]
        assert ends == [None] * (len(ends) - 1) + ["length"]


@pytest.mark.parametrize(
    "more",
    [
        {
            "top_p": 0.9,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.5,
            "logit_bias": {"5": 1},
            "user": "u",
        },
        {
            "extra_body": {
                "min_p": 0.1,
                "top_k": 5,
                "repetition_penalty": 1.1,
                "min_tokens": 2,
                "priority": -3,
            }
        },
        {
            "extra_body": {
                "bad_words": ["Paris"],
                "stop_token_ids": [7],
                "cache_salt": "a",
                "ignore_eos": True,
            }
        },
        {"extra_body": {"include_stop_str_in_output": True, "skip_special_tokens": False}, "stop": ["x"]},
        {"extra_headers": {"X-Vllm-Priority": "-2", "X-Request-Id": "mine"}},
        {"max_tokens": 10**12, "stop": "."},
        {"metadata": {"a": "b"}, "service_tier": "auto", "parallel_tool_calls": True, "store": False},
        {"response_format": {"type": "text"}, "modalities": ["text"], "tool_choice": "none"},
    ],
)
def test_the_client_may_say_everything(client: openai.OpenAI, more: dict[str, Any]) -> None:
    answer = client.chat.completions.create(**{**ASK, "temperature": 0.5, "max_tokens": 4, **more})
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_a_priority_is_a_number(served: Served) -> None:
    for wrong in ("--5", "5-", "1e3", "-", "", "9" * 20, "0x1"):
        answer = httpx.post(served.url + COMPLETIONS, json=STORY, headers={"X-Vllm-Priority": wrong})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "priority"


def test_scores_of_a_prompt_are_those_of_its_echo(served: Served) -> None:
    body = {**STORY, "echo": True, "logprobs": 1, "prompt_logprobs": 1, "return_token_ids": True}
    (choice,) = post(served, COMPLETIONS, body).json()["choices"]
    tokens, scores = choice["prompt_token_ids"], choice["prompt_logprobs"]
    echoed = choice["logprobs"]["token_logprobs"][: len(tokens)]
    pairs = zip(tokens, scores, strict=True)
    assert echoed == [score and score[str(token)]["logprob"] for token, score in pairs]
    (in_chat,) = (post(served, CHAT, {**ASK, "max_tokens": 1, "prompt_logprobs": 0, "n": 1}).json(),)
    assert in_chat["prompt_logprobs"][0] is None
    assert len(in_chat["prompt_logprobs"]) == in_chat["usage"]["prompt_tokens"]


def test_what_was_cached_is_in_the_usage(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Tell me about the sea, and about the land. " * 8}]
    options: dict[str, Any] = {"model": "demo", "messages": messages, "max_tokens": 2}
    first = client.chat.completions.create(**options).usage
    *_, last = client.chat.completions.create(**options, **USAGE)
    assert first.prompt_tokens_details.cached_tokens == 0
    assert 0 < last.usage.prompt_tokens_details.cached_tokens < last.usage.prompt_tokens
    for usage in (first, last.usage):
        told = usage.prompt_tokens_details
        assert told.cached_tokens + sum(told.missed_tokens.values()) == usage.prompt_tokens


@pytest.mark.parametrize(
    ("more", "status", "param", "words"),
    [
        ({"best_of": 2}, 400, "best_of", "removed"),
        ({"suffix": "end"}, 400, "suffix", "middle"),
        ({"extra_body": {"guided_regex": "("}}, 400, "structured_outputs", "unclosed group"),
        ({"extra_body": {"use_beam_search": True}}, 501, "use_beam_search", "cannot"),
        ({"extra_body": {"truncate_prompt_tokens": 5}}, 501, "truncate_prompt_tokens", "never cut"),
        ({"prompt": [5] * 2048}, 400, "input_tokens", "2048"),
        ({"max_tokens": 0}, 400, "max_tokens", "at least 1"),
        ({"model": "gpt-5"}, 404, "model", "demo"),
        ({"stop": [""]}, 400, "stop", "non-empty"),
    ],
)
def test_the_client_reads_why(
    client: openai.OpenAI, more: dict[str, Any], status: int, param: str, words: str
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(**{**STORY, **more})
    assert (caught.value.status_code, caught.value.param) == (status, param)
    assert words in caught.value.message


def test_a_chat_that_is_too_long_has_counts(client: openai.OpenAI) -> None:
    long = [{"role": "user", "content": "word " * 3000}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="demo", messages=long, stream=stream)
        error = caught.value
        assert error.code == "context_length_exceeded" and error.param == "input_tokens"
        assert error.body["num_tokens"] > error.body["max_model_len"] == 2048


def test_the_other_routes_warn_and_refuse_too(served: Served) -> None:
    tokens = post(served, "/tokenize", {"prompt": "hello", "prompts": 1}).json()
    assert answers.TokensAnswer.model_validate(tokens, extra="forbid").warnings
    text = post(served, "/detokenize", {"tokens": tokens["tokens"], "special": True}).json()
    assert answers.TextAnswer.model_validate(text, extra="forbid").warnings
    refused = post(served, "/tokenize", {"messages": FRANCE, "tools": [{}]})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "tools"
    chat = post(served, CHAT, {"messages": FRANCE, "reasoning_effort": "some"})
    assert chat.status_code == 400 and chat.json()["error"]["param"] == "reasoning_effort"


def test_other_methods_say_which_there_are(served: Served) -> None:
    answer = httpx.get(served.url + COMPLETIONS)
    assert answer.status_code == 405 and answer.headers["allow"] == "POST"


def test_the_document_says_what_is_answered(served: Served) -> None:
    document = httpx.get(f"{served.url}/openapi.json").json()
    assert document["servers"] == [{"url": "/"}]
    shapes = document["components"]["schemas"]
    assert shapes["ChatAnswer"]["properties"].keys() >= {"id", "choices", "usage"}
    chat = document["paths"][CHAT]["post"]
    kinds = chat["responses"]["200"]["content"]
    assert kinds["application/json"]["schema"] == {"$ref": "#/components/schemas/ChatAnswer"}
    done, said = kinds["text/event-stream"]["schema"]["properties"]["data"]["anyOf"]
    assert done == {"const": "[DONE]"}
    assert said["contentSchema"]["anyOf"] == [
        {"$ref": "#/components/schemas/ChatChunk"},
        {"$ref": "#/components/schemas/ErrorAnswer"},
    ]
    assert {"400", "401", "404", "413", "429", "501", "503", "504"} <= chat["responses"].keys()
    assert [shapes[name]["examples"] for name in ("ChatRequest", "CompletionRequest", "TokenizeRequest")]
    undescribed = [
        name for name, field in shapes["ChatRequest"]["properties"].items() if not field.get("description")
    ]
    assert undescribed == ["stream_options", "user"]
    for shape in ("ChatRequest", "CompletionRequest"):
        path = CHAT if shape == "ChatRequest" else COMPLETIONS
        for example in shapes[shape]["examples"]:  # they work as printed
            assert post(served, path, {**example, "max_tokens": 2}).status_code == 200
