"""Every endpoint through OpenAI's own client: one answer, however it is asked for."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk

from quire import __version__
from tests.server.conftest import FRANCE, PARIS, InProcess, Live

STORY = "Once upon a time"
GREEDY = {"model": "demo", "temperature": 0, "max_tokens": 12}
LONG = {**GREEDY, "max_tokens": 40, "extra_body": {"ignore_eos": True}}


def joined(chunks: Iterable[ChatCompletionChunk], index: int = 0) -> str:
    choices = [c for chunk in chunks for c in chunk.choices if c.index == index]
    return "".join(c.delta.content or "" for c in choices)


def text_of(chunks: Iterable[Completion], index: int) -> str:
    return "".join(c.text for chunk in chunks for c in chunk.choices if c.index == index)


def test_chat_answers(live: Live) -> None:
    answer = live.client().chat.completions.create(model="demo", messages=FRANCE, temperature=0)
    assert answer.choices[0].message.content == PARIS
    assert answer.choices[0].finish_reason == "stop"
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion"
    usage = answer.usage
    assert usage and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens == 15 + 8


def test_a_chat_stream_is_the_same_answer(live: Live) -> None:
    chunks = list(
        live.client().chat.completions.create(model="demo", messages=FRANCE, temperature=0, stream=True)
    )
    assert joined(chunks) == PARIS
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({c.id for c in chunks}) == 1 and all(c.usage is None for c in chunks)


def test_the_asynchronous_client_gets_the_same(live: Live) -> None:
    async def ask(stream: bool) -> str:
        async with live.async_client() as client:
            answer = await client.chat.completions.create(
                model="demo", messages=FRANCE, temperature=0, stream=stream
            )
            if not isinstance(answer, AsyncIterator):
                return answer.choices[0].message.content
            return joined([chunk async for chunk in answer])

    async def many() -> list[str]:
        return await asyncio.gather(*(ask(stream=bool(i % 2)) for i in range(16)))

    assert asyncio.run(many()) == [PARIS] * 16


def test_usage_in_a_stream(live: Live) -> None:
    create = live.client().chat.completions.create
    options: dict[str, Any] = {"model": "demo", "messages": FRANCE, "temperature": 0, "stream": True}
    *chunks, last = create(**options, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage and last.usage.completion_tokens == 8
    assert all(c.usage is None for c in chunks)
    always = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = create(**options, stream_options=always)
    counts = [c.usage.completion_tokens for c in chunks if c.usage]
    assert counts == sorted(counts) and counts[-1] == 8 and joined(chunks) == PARIS


def test_a_repeated_prompt_is_found_in_the_cache(live: Live) -> None:
    prompt = "The same words again. " * 20
    usages = [live.client().completions.create(prompt=prompt, **GREEDY).usage for _ in range(2)]
    cached = [u.prompt_tokens_details.cached_tokens for u in usages if u and u.prompt_tokens_details]
    assert cached[0] == 0 and 0 < cached[1] < usages[1].prompt_tokens
    first, again = (u.prompt_tokens_details.missed_tokens for u in usages if u and u.prompt_tokens_details)
    tail = usages[1].prompt_tokens - cached[1]
    assert first == {"new": cached[1], "tail": tail} and again == {"tail": tail}


def test_completions_of_text_and_of_tokens(live: Live) -> None:
    create = live.client().completions.create
    tokens = live.post("/tokenize", json={"prompt": STORY}).json()["tokens"]
    by_text, by_tokens = create(prompt=STORY, **GREEDY), create(prompt=tokens, **GREEDY)
    both = create(prompt=[STORY, STORY + " there"], **GREEDY)
    assert by_text.choices[0].text == by_tokens.choices[0].text == both.choices[0].text
    assert [c.index for c in both.choices] == [0, 1] and by_text.object == "text_completion"
    assert by_text.choices[0].finish_reason == "length" and by_text.usage.completion_tokens == 12
    lists = create(prompt=[tokens, tokens], **GREEDY)
    assert [c.text for c in lists.choices] == [by_text.choices[0].text] * 2


def test_streams_of_many_prompts_and_outputs(live: Live) -> None:
    create, prompts = live.client().completions.create, [STORY, "The fox"]
    options: dict[str, Any] = {"prompt": prompts, "model": "demo", "n": 3, "seed": 5, "temperature": 1.0}
    whole = create(**options, max_tokens=10)
    chunks = list(create(**options, max_tokens=10, stream=True))
    assert [c.index for c in whole.choices] == list(range(6))
    assert [text_of(chunks, i) for i in range(6)] == [c.text for c in whole.choices]
    ends = [c.index for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert sorted(ends) == list(range(6))


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_scores_the_prompt(live: Live, stream: bool) -> None:
    answer = live.client().completions.create(prompt=STORY, logprobs=2, echo=True, stream=stream, **GREEDY)
    choices = [c for part in (answer if stream else [answer]) for c in part.choices]
    text = "".join(c.text for c in choices)
    tokens = [t for c in choices for t in c.logprobs.tokens]
    offsets = [o for c in choices for o in c.logprobs.text_offset]
    scores = [s for c in choices for s in c.logprobs.token_logprobs]
    tops = [t for c in choices for t in c.logprobs.top_logprobs]
    assert text.startswith(STORY) and "".join(tokens) == text
    assert [text[o : o + len(t)] for o, t in zip(offsets, tokens, strict=True)] == tokens
    assert scores[0] is None and tops[0] is None and all(s <= 0 for s in scores[1:])
    assert all(token in top and len(top) in (2, 3) for token, top in zip(tokens[1:], tops[1:], strict=True))


def test_echo_alone_computes_nothing(live: Live) -> None:
    options: dict[str, Any] = {"model": "demo", "prompt": STORY, "max_tokens": 0, "echo": True}
    answer = live.client().completions.create(**options)
    assert answer.choices[0].text == STORY and answer.usage.completion_tokens == 0
    assert text_of(live.client().completions.create(**options, stream=True), 0) == STORY


def test_chat_logprobs(live: Live) -> None:
    create = live.client().chat.completions.create
    options: dict[str, Any] = {"messages": FRANCE, "logprobs": True, "top_logprobs": 3, **GREEDY}
    content = create(**options).choices[0].logprobs.content
    streamed = [
        entry
        for chunk in create(**options, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content
    ]
    assert [e.token for e in streamed] == [e.token for e in content]
    for entry in content:
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].token == entry.token  # greedy
        assert bytes(entry.bytes).decode() == entry.token
    assert all(
        e.top_logprobs == [] for e in create(**{**options, "top_logprobs": 0}).choices[0].logprobs.content
    )


def test_token_ids_come_when_asked_for(live: Live) -> None:
    tokens = live.post("/tokenize", json={"messages": FRANCE}).json()["tokens"]
    body = {"messages": FRANCE, "return_token_ids": True, "temperature": 0}
    whole = live.post("/v1/chat/completions", json=body).json()
    assert whole["prompt_token_ids"] == tokens
    lines = live.post("/v1/chat/completions", json={**body, "stream": True}).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert chunks[0]["prompt_token_ids"] == tokens
    streamed = [t for chunk in chunks for c in chunk["choices"] for t in c.get("token_ids", [])]
    assert streamed == whole["choices"][0]["token_ids"]
    back = live.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert FRANCE[0]["content"] in back and back.startswith("<")
    names = live.post(
        "/v1/completions", json={**GREEDY, "prompt": STORY, "logprobs": 0, "return_tokens_as_token_ids": True}
    )
    assert all(t.startswith("token_id:") for t in names.json()["choices"][0]["logprobs"]["tokens"])


def test_stop_strings_penalties_and_bias(live: Live) -> None:
    create = live.client().chat.completions.create
    stopped = create(model="demo", messages=FRANCE, temperature=0, stop=[" is"])
    assert stopped.choices[0].message.content == "The capital of France"
    assert (
        stopped.choices[0].model_extra == {"stop_reason": " is"}
        and stopped.choices[0].finish_reason == "stop"
    )
    paris = live.post("/tokenize", json={"prompt": " Paris"}).json()["tokens"][0]
    biased = create(model="demo", messages=FRANCE, temperature=0, logit_bias={str(paris): -100})
    assert "Paris" not in biased.choices[0].message.content
    forced = create(model="demo", messages=FRANCE, max_tokens=3, extra_body={"allowed_token_ids": [paris]})
    assert forced.choices[0].message.content == " Paris" * 3


def test_a_seed_gives_the_same_text_again(live: Live) -> None:
    create = live.client().completions.create
    texts = [
        create(model="demo", prompt=STORY, temperature=1.0, seed=seed, max_tokens=20).choices[0].text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_prompt_logprobs(live: Live) -> None:
    body = {**GREEDY, "prompt": STORY, "prompt_logprobs": 1}
    scores = live.post("/v1/completions", json=body).json()["choices"][0]["prompt_logprobs"]
    assert scores[0] is None and all(
        {"logprob", "rank", "decoded_token"} == set(e) for s in scores[1:] for e in s.values()
    )


def test_a_final_message_is_continued(live: Live) -> None:
    messages = [*FRANCE, {"role": "assistant", "content": "The capital of France is"}]
    body = {"messages": messages, "continue_final_message": True, "temperature": 0}
    assert (
        live.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"] == " Paris."
    )
    echoed = live.post("/v1/chat/completions", json={**body, "echo": True}).json()
    assert echoed["choices"][0]["message"]["content"] == PARIS


def test_what_the_template_is_told(live: Live) -> None:
    def count(**options: object) -> int:
        return live.post("/tokenize", json={"messages": FRANCE, **options}).json()["count"]

    assert count(add_generation_prompt=False) < count()
    assert count(chat_template_kwargs={"enable_thinking": True}) != count(
        chat_template_kwargs={"enable_thinking": False}
    )


def test_reasoning_effort_turns_thinking_on_and_off(live: Live) -> None:
    def prompt_tokens(**options: object) -> int:
        body = {"messages": FRANCE, "max_tokens": 1, **options}
        return live.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"]

    for effort, thinking in (("none", False), ("high", True)):
        kwargs = {"chat_template_kwargs": {"enable_thinking": thinking}}
        assert prompt_tokens(reasoning_effort=effort) == prompt_tokens(**kwargs)


def test_models_have_every_name(live: Live) -> None:
    cards = live.client().models.list().data
    assert [card.id for card in cards] == ["demo", "small"]
    assert cards[0].model_extra["max_model_len"] == 2048
    assert live.client().models.retrieve("small").id == "small"
    assert live.client().completions.create(**{**GREEDY, "model": "small"}, prompt=STORY).model == "small"
    assert live.post("/v1/completions", json={"prompt": STORY, "max_tokens": 1}).json()["model"] == "demo"


def test_tokens_and_text(live: Live) -> None:
    found = live.post("/tokenize", json={"prompt": STORY, "return_token_strs": True}).json()
    assert (
        found["count"] == len(found["tokens"]) == len(found["token_strs"]) and found["max_model_len"] == 2048
    )
    assert live.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": STORY}


def test_probes_and_what_operators_ask(live: Live, service: InProcess) -> None:
    assert [
        live.get(path).status_code for path in ("/livez", "/readyz", "/startupz", "/health", "/ping")
    ] == [200] * 5
    assert live.post("/ping").status_code == 200
    assert live.get("/version").json() == {"version": __version__}
    assert live.get("/load").json() == {"server_load": 0}
    metrics = live.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert 'vllm:generation_tokens_total{engine="0",model_name="demo"}' in metrics.text


def test_the_document_names_every_route(live: Live) -> None:
    document = live.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize"} <= set(
        document["paths"]
    )
    body = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]
    shape = document["components"]["schemas"][body["$ref"].rpartition("/")[2]]
    assert shape["required"] == ["prompt"] and "temperature" in shape["properties"]


def test_request_ids_go_in_and_out(live: Live) -> None:
    body = {"prompt": STORY, "max_tokens": 1, "request_id": "mine"}
    assert live.post("/v1/completions", json=body).json()["id"] == "cmpl-mine"
    answer = live.post("/v1/completions", json=body, headers={"X-Request-Id": "trace-7"})
    assert answer.json()["id"] == "cmpl-trace-7" and answer.headers["x-request-id"] == "trace-7"
    odd = live.get("/version", headers={"X-Request-Id": "<script>"}).headers["x-request-id"]
    assert odd.isalnum()
