"""Prompts equal those of transformers' apply_chat_template; what cannot be written is refused by name."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from quire.errors import ConfigError, InvalidRequest, ModelError
from quire.text.chat import ChatTemplate
from quire.text.messages import ContentFormat
from quire.text.tokenizer import Tokenizer
from tests.text import templates
from tests.tiny_tokenizer import make_tokenizer

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
SYSTEM = {"role": "system", "content": " You are helpful. "}
HELLO = {"role": "user", "content": "Hello <b> & 你好\n"}
ANSWER = {"role": "assistant", "content": "<think>hm</think>\n\nHi!  "}
MORE = {"role": "user", "content": "What is the weather?"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "1",
            "type": "function",
            "function": {"name": "weather", "arguments": {"city": "Köln", "days": 3}},
        }
    ],
}
RESULT = {"role": "tool", "tool_call_id": "1", "name": "weather", "content": '{"t": 21}'}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Gets the <weather>",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": ["integer", "null"]}},
            "required": ["city"],
        },
    },
}
CHATS = {
    "one": [HELLO],
    "system": [SYSTEM, HELLO],
    "turns": [SYSTEM, HELLO, ANSWER, MORE],
    "tools": [HELLO, ANSWER, MORE, CALL, RESULT],
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' tokenizer, for its apply_chat_template."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder, 96)
    return AutoTokenizer.from_pretrained(folder, **NAMES, pad_token=None, unk_token=None)


def ours(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return ChatTemplate(source, special_tokens=NAMES).render(messages, **options)


@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": False}, {"tools": [WEATHER, WEATHER]}])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("style", templates.ALL)
def test_prompts_equal_transformers(reference: Any, style: str, chat: str, options: dict[str, Any]) -> None:
    source, messages = templates.ALL[style], CHATS[chat]
    options = {"add_generation_prompt": True, **options}
    arguments = {"chat_template": source, "tokenize": False, **options}
    try:
        expected = reference.apply_chat_template(copy.deepcopy(messages), **arguments)
    except Exception as error:
        with pytest.raises(InvalidRequest) as raised:
            ours(source, messages, **options)
        assert str(error) in str(raised.value)
    else:
        assert ours(source, messages, **options) == expected


def test_most_combinations_are_written() -> None:
    """The comparison above also accepts that both refuse; few may."""
    refused = []
    for style, source in templates.ALL.items():
        for chat, messages in CHATS.items():
            try:
                ours(source, messages)
            except InvalidRequest:
                refused.append((style, chat))
    assert refused == [("chatml", "tools"), ("gemma", "tools")]


@pytest.mark.parametrize("style", ["hermes", "gemma", "chatml"])
@pytest.mark.parametrize("final", ["Sure, ", "Sure,\n\n", " x"])
def test_continued_messages_equal_transformers(reference: Any, style: str, final: str) -> None:
    messages = [HELLO, {"role": "assistant", "content": final}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    source = templates.ALL[style]
    expected = reference.apply_chat_template(messages, chat_template=source, tokenize=False, **options)
    assert ours(source, messages, **options) == expected
    assert expected.endswith(final.strip() if style == "gemma" else final)


def test_continued_parts_equal_transformers(reference: Any) -> None:
    content = [{"type": "text", "text": "One."}, {"type": "text", "text": "Two, "}]
    messages = [HELLO, {"role": "assistant", "content": content}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    expected = reference.apply_chat_template(
        copy.deepcopy(messages), chat_template=templates.GEMMA, tokenize=False, **options
    )
    assert ours(templates.GEMMA, messages, **options) == expected
    assert content[1]["text"] == "Two, "  # the caller's own is left as it was


def test_names_of_the_template(reference: Any) -> None:
    for names in (
        {"enable_thinking": False},
        {"enable_thinking": True},
        {"date_string": "1 Jan", "other": [1]},
    ):
        for source in (templates.HERMES, templates.LLAMA):
            expected = reference.apply_chat_template(
                [HELLO], chat_template=source, tokenize=False, add_generation_prompt=True, **names
            )
            assert ours(source, [HELLO], **names) == expected


def test_documents_and_reasoning(reference: Any) -> None:
    source = (
        "{% for d in documents %}{{ d.title }}: {{ d.text }}\n{% endfor %}"
        "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.content }}\n{% endfor %}"
    )
    documents = [{"title": "T", "text": "x"}]
    for field in ("reasoning", "reasoning_content", "thinking"):
        messages = [HELLO, {"role": "assistant", field: "hm", "content": "Hi"}]
        expected = reference.apply_chat_template(
            messages, chat_template=source, tokenize=False, documents=documents
        )
        assert ours(source, messages, documents=documents, add_generation_prompt=False) == expected
        assert "hm|hm|Hi" in expected


def test_both_ways_to_end_exclude_each_other() -> None:
    with pytest.raises(InvalidRequest, match="add_generation_prompt to False"):
        ours(templates.CHATML, [HELLO], continue_final_message=True)


def test_a_final_message_that_the_template_drops_cannot_be_continued() -> None:
    with pytest.raises(InvalidRequest, match="leaves out the final message"):
        ours(
            "{{ messages[0].content }}",
            [HELLO, ANSWER],
            continue_final_message=True,
            add_generation_prompt=False,
        )
    with pytest.raises(InvalidRequest, match=r"messages\[1\].content is None"):
        ours(templates.HERMES, [HELLO, CALL], continue_final_message=True, add_generation_prompt=False)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (templates.CHATML, ContentFormat()),
        (templates.HERMES, ContentFormat()),
        (templates.LLAMA, ContentFormat()),
        (templates.GEMMA, ContentFormat(parts=True, strings=True)),
        (templates.MACROS, ContentFormat(parts=True, strings=True)),
        (templates.PARTS, ContentFormat(parts=True, strings=False)),
        (
            "{% for m in messages %}{% for line in m.content.split('a') %}{{ line }}{% endfor %}{% endfor %}",
            ContentFormat(),
        ),
    ],
)
def test_content_format(source: str, expected: ContentFormat) -> None:
    assert ChatTemplate(source).content_format == expected


def test_content_takes_the_form_that_the_template_reads() -> None:
    parts = [{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}]
    user = {"role": "user", "content": parts}
    show = "{% for m in messages %}{{ m.content | tojson }}{% endfor %}"
    assert ours(show, [user]) == '"a\\nb\\nc"'
    assert (
        ours(templates.CHATML, [user], add_generation_prompt=False) == "<|im_start|>user\na\nb\nc<|im_end|>\n"
    )
    assert ours(templates.PARTS, [user, {"role": "user", "content": "plain"}]) == "user: abcuser: plain"
    forced = ChatTemplate(show, content_format="openai").render([{"role": "user", "content": "x"}])
    assert forced == '[{"type": "text", "text": "x"}]'
    forced = ChatTemplate(templates.GEMMA, special_tokens=NAMES, content_format="string")
    assert "a\nb\nc<end_of_turn>" in forced.render([user])


def test_media_parts_pass_only_where_they_are_expected() -> None:
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    prompt = ChatTemplate(templates.GEMMA, special_tokens=NAMES, media=["image"]).render([message])
    assert "<start_of_turn>user\n<image>What?<end_of_turn>" in prompt
    with pytest.raises(
        InvalidRequest, match=r"messages\[0\].content\[0\].type is 'image'; it must be one of text"
    ):
        ours(templates.GEMMA, [message])
    with pytest.raises(InvalidRequest, match="takes no other parts"):
        ChatTemplate(templates.CHATML, media=["image"]).render([message])


def test_arguments_written_as_json_reach_the_template_as_objects() -> None:
    call = copy.deepcopy(CALL)
    call["tool_calls"][0]["function"]["arguments"] = json.dumps({"city": "Köln", "days": 3})
    for source in (templates.HERMES, templates.LLAMA):
        assert ours(source, [HELLO, call]) == ours(source, [HELLO, CALL])
    assert isinstance(call["tool_calls"][0]["function"]["arguments"], str)


@pytest.mark.parametrize(
    ("written", "read"), [("", "{}"), ("{oops", '"{oops"'), ("[1]", '"[1]"'), ("{}", "{}")]
)
def test_arguments_that_are_no_object_stay_as_the_model_wrote_them(written: str, read: str) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": written}}]}
    assert f'"arguments": {read}}}' in ours(templates.HERMES, [HELLO, call])


def test_no_tool_calls_are_as_if_not_given() -> None:
    assert ours("{{ messages[0].tool_calls is defined }}", [{**ANSWER, "tool_calls": []}]) == "False"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is []"),
        ("hi", "messages is 'hi'"),
        (["hi"], "messages[0] is 'hi'"),
        ([HELLO, {"content": "x"}], "messages[1].role is None"),
        ([{"role": 3, "content": "x"}], "messages[0].role is 3"),
        ([{"role": "user", "content": 5}], "messages[0].content is 5"),
        ([{"role": "user", "content": [5]}], "messages[0].content[0] is 5"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text is None"),
        ([{"role": "user", "content": [{"type": "x"}]}], "messages[0].content[0].type is 'x'"),
        ([{"role": "user", "content": "x", "name": object()}], "messages[0] holds a object"),
        ([{"role": "assistant", "tool_calls": {}}], "messages[0].tool_calls is {}"),
        ([{"role": "assistant", "tool_calls": ["x"]}], "messages[0].tool_calls[0].function is None"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "tool_calls[0].function.name is None"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 3}}]}],
            "messages[0].tool_calls[0].function.arguments is 3",
        ),
    ],
)
def test_malformed_messages_are_named(messages: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        ours(templates.CHATML, messages)
    assert message in str(raised.value)
    assert raised.value.param == "messages"


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("weather", "tools is 'weather'"),
        (["weather"], "tools[0] is 'weather'"),
        ([{"type": "function", "function": 3}], "tools[0].function is 3"),
        ([{"type": "function", "function": {}}], "tools[0].function.name is None"),
        ([{"function": {"name": "f", "parameters": []}}], "tools[0].function.parameters is []"),
    ],
)
def test_malformed_tools_are_named(tools: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        ours(templates.CHATML, [HELLO], tools=tools)
    assert message in str(raised.value)
    assert raised.value.param == "tools"


def test_deep_nesting_is_refused() -> None:
    deep: Any = "x"
    for _ in range(200):
        deep = [deep]
    with pytest.raises(InvalidRequest, match="nested more than"):
        ours(templates.CHATML, [{"role": "user", "content": "x", "extra": deep}])


def test_what_the_template_says_reaches_the_user() -> None:
    with pytest.raises(InvalidRequest, match="Conversation roles must alternate"):
        ours(templates.GEMMA, [HELLO, ANSWER, ANSWER])
    with pytest.raises(InvalidRequest, match="cannot write these messages: TypeError"):
        ours("{{ 'a' + 1 }}", [HELLO])


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


AGENTS = [
    said("developer", "a"),
    said("developer", "b"),
    said("user", "c"),
    said("user", "d"),
    said("system", "e"),
]


@pytest.mark.parametrize(
    ("source", "prompt"),
    [
        (templates.STRICT, "<system>a\n\nb\n<user>c\n<user>d\n<user>e\n"),
        (templates.FORGETFUL, "<developer>a\n\nb\n<user>c\n<user>d\n<user>e\n"),
        (
            templates.GEMMA.replace("<end_of_turn>\\n", "|"),
            "<s><start_of_turn>user\na\n\nb\n\nc\n\nd\n\ne|<start_of_turn>model\n",
        ),
        (
            templates.GEMMA.replace("messages[0]['role'] == 'system'", "false").replace(
                "<end_of_turn>\\n", "|"
            ),
            "<s><start_of_turn>user\na\n\nb\n\nc\n\nd\n\ne|<start_of_turn>model\n",
        ),
        (
            templates.CHATML,
            "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in AGENTS)
            + "<|im_start|>assistant\n",
        ),
    ],
)
def test_what_agents_send_is_written_whole(source: str, prompt: str) -> None:
    before = copy.deepcopy(AGENTS)
    assert ours(source, AGENTS) == prompt
    assert before == AGENTS


def test_parts_are_joined_as_parts() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('no') }}"
    )
    source += "{% endif %}{% for part in m.content %}[{{ m.role }} {{ part.text }}]{% endfor %}{% endfor %}"
    parts = {"role": "system", "content": [{"type": "text", "text": "b"}]}
    assert ours(source, [said("system", "a"), parts, said("user", "c")]) == "[system a][system b][user c]"


def test_the_wrong_template_is_the_models_fault() -> None:
    for source in (
        "{% for %}",
        "{{ x | nosuchfilter }}",
        "{% include 'x' %}",
        "{{ x | pprint }}",
        "{% nosuch %}",
    ):
        with pytest.raises(ModelError, match="chat template"):
            ChatTemplate(source)
    with pytest.raises(ModelError, match="may not"):
        ours("{{ ''.__class__.__mro__ }}", [HELLO])


def test_named_templates() -> None:
    both = ChatTemplate({"default": "plain", "tool_use": "tools"})
    assert both.render([HELLO]) == "plain"
    assert both.render([HELLO], tools=[WEATHER]) == "tools"
    with pytest.raises(InvalidRequest, match="pass chat_template"):
        ChatTemplate({"rag": "x"}).render([HELLO])


def test_which_template(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, 96)
    tokenizer = Tokenizer.load(tmp_path)
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    assert template.render([{"role": "user", "content": "hi"}]) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    path = tmp_path / "other.jinja"
    path.write_text("{{ eos_token }}!", encoding="utf-8")
    for given in (str(path), "{{ eos_token }}!"):
        other = ChatTemplate.of(tokenizer, given)
        assert other is not None
        assert other.render([HELLO]) == "<|im_end|>!"
    with pytest.raises(ConfigError, match="it must be a name"):
        ChatTemplate.of(tokenizer, str(path), files=False)
    with pytest.raises(ConfigError, match="it must be a name"):
        ChatTemplate.of(tokenizer, "nothing")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert ChatTemplate.of(Tokenizer.load(tmp_path)) is None
