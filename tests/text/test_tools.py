"""Answers read at every split: the same events, whoever feeds the parser, and never an exception."""

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import pytest

from quire.errors import ConfigError
from quire.text.tools.dialect import Dialect
from quire.text.tools.events import (
    Answer,
    ArgumentsDelta,
    CallBegins,
    CallEnds,
    Event,
    TextDelta,
    answer,
    merged,
)
from quire.text.tools.parser import Parser
from quire.text.tools.registry import reasoning_format, reasonings, tool_format, tool_formats
from tests.text.transcripts import TOOLS, TRANSCRIPTS, Transcript

every = pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=lambda t: t.name.replace(" ", "-"))
SPECIAL = re.compile(
    r"<｜[^｜>]+｜>|｜DSML｜|<\|[^|>]+\|>|<\|[a-z_]+>|<[a-z_]+\|>|\[[A-Z_]+\]|</?[a-z_]*think>"
)


class Specials:
    """Special tokens of a tokenizer, numbered."""

    def __init__(self, texts: Iterable[str]):
        self.texts = sorted(set(texts))
        self.special_ids = frozenset(range(len(self.texts)))

    def token(self, index: int) -> str:
        return self.texts[index]


def dialect(t: Transcript, specials: Specials | None = None) -> Dialect:
    return Dialect(tool_format(t.tools, ()), reasoning_format(t.thinking, ()), specials)


def read(parser: Parser, pieces: Iterable[str]) -> list[Event]:
    """All events, joined, so that they can be compared."""
    return merged([*(event for piece in pieces for event in parser.feed(piece)), *parser.finish()])


def cut(text: str, places: Sequence[int]) -> Iterator[str]:
    yield from (text[a:b] for a, b in pairwise([0, *places, len(text)]))


def check(found: list[Event], t: Transcript) -> None:
    whole = answer(found)
    assert (whole.reasoning, whole.text) == (t.reasoning, t.text)
    assert [(call.name, json.loads(call.arguments)) for call in whole.calls] == list(t.calls)
    if t.ids:
        assert tuple(call.id for call in whole.calls) == t.ids
    assert len({call.id for call in whole.calls}) == len(whole.calls)


@every
def test_answers_are_read_at_every_split(transcript: Transcript) -> None:
    t = transcript
    speaks = dialect(t)
    whole = read(speaks.parser(tools=TOOLS), [t.answer])
    check(whole, t)
    for place in range(1, len(t.answer)):
        assert read(speaks.parser(tools=TOOLS), cut(t.answer, [place])) == whole, place
    assert read(speaks.parser(tools=TOOLS), t.answer) == whole  # a character at a time
    draw = random.Random(0)
    for _ in range(20):
        places = sorted(draw.sample(range(len(t.answer)), draw.randint(2, 9)))
        assert read(speaks.parser(tools=TOOLS), cut(t.answer, places)) == whole, places


@every
def test_special_tokens_are_markers_by_their_ids(transcript: Transcript) -> None:
    t = transcript
    specials = Specials(SPECIAL.findall(t.answer))
    speaks = dialect(t, specials)
    marks = {specials.token(index): mark for index, mark in speaks.marks.items()}
    text = SPECIAL.sub(lambda found: marks.get(found[0], ""), t.answer)  # as a detokenizer writes it
    whole = read(speaks.parser(tools=TOOLS), [text])
    check(whole, t)
    assert read(speaks.parser(tools=TOOLS), text) == whole


def test_text_that_looks_like_a_special_token_is_text() -> None:
    kimi = Dialect(tool_format("kimi_k2", ()), None, Specials(["<|tool_calls_section_begin|>", "<|other|>"]))
    assert list(kimi.marks) == [1]
    said = "write <|tool_calls_section_begin|> <|tool_call"
    assert answer(read(kimi.parser(tools=TOOLS), said)) == Answer("", said, [])


@every
def test_answers_that_break_off_anywhere_keep_their_order(transcript: Transcript) -> None:
    speaks = dialect(transcript)
    for end in range(len(transcript.answer)):
        begun = ended = 0
        for event in read(speaks.parser(tools=TOOLS), [transcript.answer[:end]]):
            match event:
                case CallBegins():
                    assert (event.index, begun) == (begun, ended)
                    begun += 1
                case ArgumentsDelta():
                    assert event.index == ended < begun
                case CallEnds():
                    assert event.index == ended
                    ended += 1
        assert begun == ended


@every
def test_without_tools_nothing_is_a_call(transcript: Transcript) -> None:
    found = answer(read(dialect(transcript).parser(tools=()), [transcript.answer]))
    assert found.calls == []
    assert found.reasoning == transcript.reasoning
    if not transcript.calls:
        assert found.text == transcript.text


def test_further_calls_are_left_out_where_one_may_be_made() -> None:
    t = TRANSCRIPTS[0]
    (call,) = answer(read(dialect(t).parser(tools=TOOLS, most_calls=1), t.answer)).calls
    assert (call.name, json.loads(call.arguments)) == t.calls[0]


def test_arguments_come_as_the_model_writes_them() -> None:
    parser = dialect(TRANSCRIPTS[0]).parser(tools=TOOLS)
    assert [type(e) for e in parser.feed('<tool_call>{"name": "now"')] == [CallBegins]
    assert parser.feed(', "arguments": {"a": "b') == [ArgumentsDelta(0, '{"a": "b')]
    assert parser.feed(" c") == [ArgumentsDelta(0, " c")]
    coder = Dialect(tool_format("qwen3_coder", ()), None, None).parser(tools=TOOLS)
    coder.feed("<function=write_file><parameter=content>\nline")
    assert coder.feed(' "1"\n') == [ArgumentsDelta(0, ' \\"1\\"')]


def test_ids_are_the_same_when_an_answer_is_read_again() -> None:
    def ids(tools: str, seed: str) -> list[str]:
        t = next(t for t in TRANSCRIPTS if t.tools == tools)
        return [call.id for call in answer(read(dialect(t).parser(tools=TOOLS, seed=seed), [t.answer])).calls]

    assert ids("hermes", "a") == ids("hermes", "a") != ids("hermes", "b")
    assert all(re.fullmatch("call_[0-9a-f]{24}", call) for call in ids("hermes", "a"))
    assert all(
        re.fullmatch("[0-9a-z]{9}", call) for call in ids("mistral", "a")
    )  # its template asks for that


NO_CALLS = [
    "Use <tool_call> for calls.",
    "<tool_call>",
    "<tool_call>\n{",
    '<tool_call>{"a": 1}</tool_call>',
    '<tool_call>{"name": 7}</tool_call>',
    "<tool_call>[]</tool_call>",
    '<tool_call>{"name": "x',
    "a <tool_cal",
    " \n leading and trailing \n ",
]


@pytest.mark.parametrize("text", NO_CALLS)
def test_what_is_no_call_is_text_and_nothing_is_lost(text: str) -> None:
    for pieces in ([text], text):
        found = answer(read(Dialect(tool_format("hermes", ()), None, None).parser(tools=TOOLS), pieces))
        assert found == Answer("", text, [])


HOSTILE = [
    "<tool_call>" * 20_000,
    '<tool_call>{"name": "' + "n" * 200_000,
    '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 50_000,
    '<tool_call>{"name": "f", "arguments": ' + "[" * 100_000 + "]" * 100_000 + "}</tool_call>",
    '<tool_call>{"arguments": "' + "\\" * 199_999,
    "<tool_call>" + '{"function": ' * 30_000,
    "<" * 200_000,
    " " * 200_000 + "x",
    "<function=f><parameter=a>" + "\n" * 100_000 + "</parameter" * 10_000,
    "<function=get_weather><parameter=where>" + "[" * 100_000 + "</parameter></function>",
    "<function=get_weather><parameter=days>" + "9" * 100_000 + "</parameter></function>",
    "<function=" + "n" * 200_000,
    "[now(" + "(" * 100_000,
    "[now(a=" + "1" * 200_000 + ")]",
    "[now(a='" + "\\u12" * 50_000,
    "[now(a=0x" + "f" * 100_000 + ", b=1e999, c=nan)]",
    "[" * 200_000,
    "<|channel|>" * 20_000,
    "<|channel|>analysis to=functions.x<|message|>" * 4_000,
    "<|tool_call>call:now{" + "a:{" * 60_000,
    "<|tool_calls_section_begin|><|tool_call_begin|>" + "functions.f:" * 20_000,
]


@pytest.mark.parametrize(
    "name", ["hermes", "qwen3_coder", "pythonic", "openai", "gemma4", "kimi_k2", "llama3_json"]
)
def test_hostile_answers_take_time_in_proportion_to_their_length(name: str) -> None:
    """That it ends is the test: anything quadratic in these lengths would take hours."""
    for text in HOSTILE:
        speaks = Dialect(tool_format(name, ()), reasoning_format("qwen3", ()), None)
        whole = answer(read(speaks.parser(tools=TOOLS), [text]))
        pieces = (text[at : at + 97] for at in range(0, len(text), 97))
        assert answer(read(speaks.parser(tools=TOOLS), pieces)) == whole


def test_random_text_of_markers_is_read_alike_at_every_split() -> None:
    draw = random.Random(7)
    for format_ in tool_formats():
        speaks = Dialect(format_, reasoning_format("auto", ["<think>"]), None)
        words = [m for state in format_.states.values() for m in state.on if m]
        words += [
            "<think>",
            "</think>",
            '{"name": "now"',
            ', "arguments": {"a": "',
            '"}}',
            "now",
            "\n",
            " x ",
            "{",
            "]",
            '"',
        ]
        for _ in range(60):
            text = "".join(draw.choices(words, k=12))
            whole = read(speaks.parser(tools=TOOLS), [text])
            assert read(speaks.parser(tools=TOOLS), text) == whole, (format_.names[0], text)


def test_no_marker_of_a_state_is_part_of_another() -> None:
    for format_ in tool_formats():
        for name, state in format_.states.items():
            for one in filter(None, state.on):
                assert not [m for m in state.on if m != one and one in m], (format_.names[0], name)
            assert set(state.on.values()) | {then for _, then in state.choices} <= format_.states.keys()
        assert "text" in format_.states


def test_every_format_has_a_transcript_and_a_name_of_its_own() -> None:
    formats = [*tool_formats(), *reasonings()]
    named = {t.tools for t in TRANSCRIPTS} | {t.thinking for t in TRANSCRIPTS}
    assert [f.names[0] for f in formats if not named & set(f.names)] == []
    for group in (tool_formats(), reasonings()):
        names = [name for f in group for name in f.names]
        assert len(names) == len(set(names))
    with pytest.raises(
        ConfigError, match="tool_call_parser is 'hermess'; it must be one of auto, none, .*hermes"
    ):
        tool_format("hermess", ())


@pytest.mark.parametrize(
    ("prompt", "continued", "start"),
    [
        ("<|im_start|>assistant\n", "", "start"),
        ("<|im_start|>assistant\n<think>\n", "", "reasoning"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "", "start"),
        ("What is <think>?<|im_end|>\n<|im_start|>assistant\n", "", "start"),
        ("<|im_start|>assistant\n<think>I am", "<think>I am", "reasoning"),
        ("<|im_start|>assistant\n<think>I am</think>It", "<think>I am</think>It", "text"),
    ],
)
def test_prompts_say_whether_the_answer_begins_with_reasoning(
    prompt: str, continued: str, start: str
) -> None:
    assert Dialect(None, reasoning_format("qwen3", ()), None).start(prompt, continued) == start


@pytest.mark.parametrize(
    ("head", "start"),
    [
        ("", "start"),
        ("<|channel|>analysis<|message|>We", "reasoning"),
        ("<|channel|>final<|message|>The", "text"),
    ],
)
def test_prompts_of_channels_say_where_the_answer_begins(head: str, start: str) -> None:
    prompt = f"<|start|>user<|message|>Hi<|end|><|start|>assistant{head}"
    assert Dialect(tool_format("openai", ()), None, None).start(prompt) == start


def test_reasoning_is_where_the_parser_says() -> None:
    text = "<think>one two</think>three"
    parser = Dialect(None, reasoning_format("qwen3", ()), None).parser()
    read(parser, text)
    assert [text[a:b] for a, b in parser.spans] == ["one two</think>"]


def test_special_tokens_end_reasoning_that_was_not_closed() -> None:
    specials = Specials(["<|tool_calls_section_begin|>", "<|tool_call_begin|>"])
    speaks = Dialect(tool_format("kimi_k2", ()), reasoning_format("kimi_k2", ()), specials)
    section, call = speaks.marks[1], speaks.marks[0]
    text = f"<think>Hm.{section}{call}functions.now:0<|tool_call_argument_begin|>{{}}"
    found = answer(read(speaks.parser(tools=TOOLS), text))
    assert (found.reasoning, [c.name for c in found.calls]) == ("Hm.", ["now"])


def test_text_streams_without_delay() -> None:
    parser = Dialect(tool_format("hermes", ()), reasoning_format("qwen3", ()), None).parser(tools=TOOLS)
    assert [parser.feed(piece) for piece in ("Hi", " there", " <", "b")] == [
        [TextDelta("Hi")],
        [TextDelta(" there")],
        [],
        [TextDelta(" <b")],
    ]


SIGNS = [
    ('<tools>...</tools> <tool_call>\\n{"name": ...}\\n</tool_call>', "hermes", None),
    ("'<think>\\n\\n</think>\\n\\n' <tool_call> </tool_call>", "hermes", "think"),
    (
        "<tool_call>\\n<function=example>\\n<parameter=a>\\n</parameter>\\n</function>",
        "qwen3_coder",
        None,
    ),
    ("<seed:tool_call>\\n<function=f>\\n<parameter=x> <seed:think>", "seed_oss", "seed_oss"),
    ("<|start_header_id|> Environment: ipython <|python_tag|>", "llama3_json", None),
    (
        '<|start_header_id|> {"name": f, "parameters": dictionary of argument name and its value}',
        "llama3_json",
        None,
    ),
    ("<|start_header_id|> [func_name1(params_name1=params_value1, ...)]", "pythonic", None),
    ("<|header_start|> <|python_start|> <|python_end|>", "llama4_pythonic", None),
    ("<|tool_list_start|> <|im_start|>", "lfm2", None),
    ("<function_calls> </function_calls> <functions>", "olmo3", None),
    ("[AVAILABLE_TOOLS] [TOOL_CALLS] [/INST]", "mistral", None),
    ("[AVAILABLE_TOOLS] [TOOL_CALLS] [ARGS] [THINK] [/THINK]", "mistral_v11", "mistral"),
    (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + '<｜tool▁sep｜>' + '```json' </think>",
        "deepseek_v3",
        "think",
    ),
    ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + '<｜tool▁sep｜>' </think>", "deepseek_v31", "think"),
    ("<｜DSML｜function_calls> <think>", "deepseek_v32", "think"),
    ("<|tool_calls_section_begin|><|tool_call_begin|> <|im_middle|>", "kimi_k2", None),
    ("<tool_call>{name} <arg_key> <arg_value> </tool_call> <think>", "glm45", "think"),
    ("<|start|>assistant<|channel|>analysis<|message|>", "harmony", "harmony"),
    ("<minimax:tool_call> <invoke name= <think>", "minimax_m2", "think"),
    ("<start_function_call>call:f{} <escape>", "functiongemma", None),
    ("<|tool_call>call: <tool_call|> <|channel>thought <channel|>", "gemma4", "gemma4"),
    ("<|start_of_role|> <|tool_call|>", "granite", None),
    ("<|start_of_role|> <|tool_call|> write Here is my thought process:", "granite", "granite"),
    ("<|start_of_role|> <tool_call> </tool_call>", "hermes", None),
    ("<|tool|> <|/tool|> <|end|>", "phi4_mini_json", None),
    ("<｜tool_calls_begin｜> <steptml:invoke <think>", "step3", "think"),
    ("<tool_call> </tool_call> <think> <response>", "hermes", "ernie45"),
    ("<tool_calls> </tool_calls> <think> <answer>", "hunyuan_a13b", "hunyuan_a13b"),
    (
        "<|START_ACTION|> <|END_ACTION|> <|START_THINKING|> <|END_THINKING|>",
        "cohere_command3",
        "cohere_command3",
    ),
    ("<|im_start|>{{ message.content }}<|im_end|>", None, None),
]


@pytest.mark.parametrize(("template", "tools", "reasoning"), SIGNS)
def test_templates_show_their_formats(template: str, tools: str | None, reasoning: str | None) -> None:
    found = [tool_format("auto", [template]), reasoning_format("auto", [template])]
    assert [each and each.names[0] for each in found] == [tools, reasoning]
    assert tool_format("none", [template]) is None
