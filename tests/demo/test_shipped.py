"""The models that come with Quire: their files, Transformers as the judge of their tokens, what they can do."""

import copy
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from examples.train_demo.evaluate import measure
from examples.train_demo.skills import SKILLS
from quire import LLM, SamplingParams
from quire.checkpoint.files import SINGLE, Stored, read_config, read_header
from quire.checkpoint.source import resolve
from quire.errors import UnsupportedModel

MB = 10**6
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
GREEDY = SamplingParams(temperature=0, max_tokens=160)
FLOORS = {  # of right answers, thinking allowed, to held-out questions
    "facts": 0.97,
    "unknown": 0.9,
    "sums": 0.97,
    "extract": 0.95,
    "tools": 0.95,
    "arithmetic": 0.7,
    "strings": 0.85,
}
CAPITALS = {"role": "system", "content": "Answer in capitals."}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    """`parameters`: name -> description, all of them strings and required."""
    properties = {key: {"type": "string", "description": text} for key, text in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": schema},
    }


WEATHER = tool("get_weather", "Get the current weather of a city.", city="Name of the city")
TIME = tool("get_time", "Get the current time in a city.", city="Name of the city")
ASK_TWO = user("What is the weather in Paris and in Rome?")
CALLS = [
    {"type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}
    for city in ("Paris", "Rome")
]
RESULTS = [
    {"role": "tool", "content": json.dumps({"condition": condition, "temperature": degrees})}
    for condition, degrees in (("sunny", 21), ("rainy", 14))
]
CHATS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {  # messages, what else the template gets
    "fact": ([user("What is the capital of France?")], {}),
    "thinking": ([user("What is 47 + 38?")], {}),
    "not thinking": ([user("What is 47 + 38?")], {"enable_thinking": False}),
    "system": ([CAPITALS, user("What does a cow say?")], {}),
    "turns": ([user("My name is Nina."), assistant("Nice to meet you, Nina."), user("What is my name?")], {}),
    "story": ([user("Tell me a story about a fox.")], {}),
    "tools": ([ASK_TWO], {"tools": [WEATHER, TIME]}),
    "results": (
        [ASK_TWO, {"role": "assistant", "content": "", "tool_calls": CALLS}, *RESULTS],
        {"tools": [WEATHER, TIME]},
    ),
}


def folder(name: str) -> Path:
    return resolve(name).folder


def stored(name: str) -> dict[str, Stored]:
    return dict(read_header(folder(name) / SINGLE))


def num_parameters(name: str) -> int:
    return sum(math.prod(tensor.shape) for tensor in stored(name).values())


def num_bytes(name: str) -> int:
    return sum(path.stat().st_size for path in folder(name).iterdir() if path.is_file())


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", dtype="float32", device="cpu", max_logprobs=-1, disable_log_stats=True) as llm:
        yield llm


def ask(llm: LLM, *messages: dict[str, Any], tools: list[dict[str, Any]] | None = None, **names: Any) -> str:
    output = llm.chat(list(messages), GREEDY, use_tqdm=False, tools=tools, chat_template_kwargs=names)[0]
    assert output.outputs[0].finish_reason == "stop"
    return output.outputs[0].text


def answer(text: str) -> str:
    """Without the part that was thought."""
    return text.rsplit("</think>", 1)[-1].strip()


def test_files_and_sizes() -> None:
    for name in ("demo", "demo-draft"):
        assert read_config(folder(name))["architectures"] == ["Qwen3ForCausalLM"]
        assert {tensor.dtype for tensor in stored(name).values()} == {"BF16"}
        assert (folder(name) / "generation_config.json").is_file()
    assert 5 * MB <= num_parameters("demo") <= 8 * MB
    assert (folder("demo") / SINGLE).stat().st_size <= 16 * MB
    assert (folder("demo") / "README.md").is_file()
    assert num_parameters("demo-draft") < 1 * MB
    assert num_bytes("demo-draft") + num_bytes("demo-eagle3") < 6 * MB


def test_the_draft_model_has_the_same_tokens() -> None:
    for name in TOKENIZER:
        main, draft = folder("demo") / name, folder("demo-draft") / name
        assert main.is_file() == draft.is_file(), name
        assert not main.is_file() or main.read_bytes() == draft.read_bytes(), name
    assert (folder("demo") / "tokenizer.json").is_file()
    assert read_config(folder("demo"))["vocab_size"] == read_config(folder("demo-draft"))["vocab_size"]


def test_the_draft_head_fits_the_model() -> None:
    tensors, config, main = stored("demo-eagle3"), read_config(folder("demo-eagle3")), stored("demo")
    vocab_size, dim = main["model.embed_tokens.weight"].shape
    num_drafted = config["draft_vocab_size"]
    assert tensors["fc.weight"].shape == (dim, 3 * dim)
    assert tensors["lm_head.weight"].shape == (num_drafted, dim)
    assert tensors["d2t"] == Stored("I64", (num_drafted,))
    assert tensors["t2d"] == Stored("BOOL", (vocab_size,))


def test_a_draft_head_alone_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"Eagle3.* is a draft head.*speculative decoding"):
        LLM("demo-eagle3")


@pytest.mark.parametrize("name", CHATS)
def test_prompts_are_those_of_transformers(llm: LLM, name: str) -> None:
    messages, names = CHATS[name]
    theirs = AutoTokenizer.from_pretrained(folder("demo"), trust_remote_code=False)
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **names)
    found = llm.engine.inputs.chat_prompt(messages, None, **names)
    assert found == expected
    ids = theirs(expected, add_special_tokens=False).input_ids
    assert llm.get_tokenizer().encode(found, add_special_tokens=False) == ids


@pytest.mark.parametrize("model", ["demo", "demo-draft"])
def test_tokens_and_logits_are_those_of_transformers(model: str) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        folder(model), dtype=torch.float32, trust_remote_code=False
    ).eval()
    own = theirs.generation_config
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=48, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    theirs.generation_config = greedy  # in place of the checkpoint's own, which samples
    params = SamplingParams(temperature=0, max_tokens=48, logprobs=-1)
    with LLM(model, dtype="float32", device="cpu", max_logprobs=-1, disable_log_stats=True) as llm:
        prompts = [llm.engine.inputs.chat_prompt(chat, None, **names) for chat, names in CHATS.values()]
        inputs = [llm.get_tokenizer().encode(prompt, add_special_tokens=False) for prompt in prompts]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in inputs], params, use_tqdm=False)
    for name, ids, output in zip(CHATS, inputs, outputs, strict=True):
        with torch.inference_mode():
            made = theirs.generate(input_ids=torch.tensor([ids]))[0, len(ids) :].tolist()
            logits = theirs(torch.tensor([ids])).logits[0, -1]
        found = output.outputs[0]
        assert list(found.token_ids) == made, name
        scores = torch.tensor([found.logprobs[0][token].logprob for token in range(len(logits))])
        torch.testing.assert_close(scores, logits.log_softmax(-1), atol=2e-4, rtol=0)


def test_the_draft_model_generates() -> None:
    with LLM("demo-draft", disable_log_stats=True) as llm:
        output = llm.generate("Once upon a time", GREEDY, use_tqdm=False)[0].outputs[0]
    assert len(output.token_ids) > 5
    assert re.search(r"[a-z]{3}", output.text)


def test_raw_text_is_continued(llm: LLM) -> None:
    question, story = llm.generate(
        ["What is the capital of France?", "Once upon a time"], GREEDY, use_tqdm=False
    )
    assert "Paris" in question.outputs[0].text
    assert len(story.outputs[0].text.split()) > 20


def test_three_turns(llm: LLM) -> None:
    messages: list[dict[str, Any]] = []
    for words, expected in (
        ("My name is Nina.", "Nina"),
        ("What is the capital of France?", "Paris"),
        ("What is my name?", "Nina"),
    ):
        messages.append(user(words))
        text = ask(llm, *messages)
        assert expected in text, words
        messages.append(assistant(text))


def test_a_system_prompt_is_obeyed(llm: LLM) -> None:
    text = answer(ask(llm, CAPITALS, user("What is the capital of France?")))
    assert "PARIS" in text
    assert text.isupper()


def test_thinking_can_be_switched_off(llm: LLM) -> None:
    thought = ask(llm, user("What is 47 + 38?"))
    assert re.fullmatch(r"\s*(<think>)?.+</think>.*85.*", thought, re.DOTALL)
    at_once = ask(llm, user("What is 47 + 38?"), enable_thinking=False)
    assert "think>" not in at_once
    assert "85" in at_once


def test_tools_are_called_in_parallel(llm: LLM) -> None:
    text = ask(llm, ASK_TWO, tools=[TIME, WEATHER])
    found = [json.loads(call) for call in re.findall(r"<tool_call>\s*(.*?)\s*</tool_call>", text, re.DOTALL)]
    assert found == [call["function"] for call in CALLS]


def test_answers_are_read_offline(llm: LLM) -> None:
    output = llm.chat([ASK_TWO], GREEDY, use_tqdm=False, tools=[TIME, WEATHER])[0]
    (found,) = llm.answers(output, [TIME, WEATHER])
    assert [(call.name, json.loads(call.arguments)) for call in found.calls] == [
        (call["function"]["name"], call["function"]["arguments"]) for call in CALLS
    ]
    assert (found.text, found.reasoning) == ("", "")
    (found,) = llm.answers(output)
    assert found.calls == [] and found.text == output.outputs[0].text.strip()


def test_calls_offline_fit_their_schemas(llm: LLM) -> None:
    elsewhere = copy.deepcopy(WEATHER)
    elsewhere["function"]["parameters"]["properties"]["city"]["enum"] = ["Oslo", "Lima"]
    output = llm.chat([ASK_TWO], GREEDY, use_tqdm=False, tools=[TIME, elsewhere])[0]
    (found,) = llm.answers(output, [TIME, elsewhere])
    assert [call.name for call in found.calls] == ["get_weather"] * 2
    assert all(json.loads(call.arguments)["city"] in ("Oslo", "Lima") for call in found.calls)


def test_the_results_of_tools_are_used(llm: LLM) -> None:
    called = {"role": "assistant", "content": "", "tool_calls": CALLS}
    text = ask(llm, ASK_TWO, called, *RESULTS, tools=[TIME, WEATHER])
    assert all(word in text for word in ("Paris", "sunny", "21", "Rome", "rainy", "14"))


def test_what_it_does_not_know(llm: LLM) -> None:
    assert answer(ask(llm, user("How many people live in Paris?"))).startswith("I don't know")


@pytest.mark.slow
@pytest.mark.parametrize("skill", SKILLS)
def test_held_out_questions_are_answered(llm: LLM, skill: str) -> None:
    right, formed, _, formed_at_once = measure(llm, skill, 60)
    assert right >= FLOORS.get(skill, 0.95)
    assert min(formed, formed_at_once) >= 0.98
