"""Every format of calls as a grammar: whatever it lets pass is read back as calls that fit their tools' schemas."""

import json
import re
from collections.abc import Sequence

import jsonschema
import llguidance
import numpy as np
import pytest
from tokenizers import AddedToken

from quire.errors import InvalidRequest
from quire.grammar.calls import CallGrammar
from quire.grammar.compiling import Vocabulary, masks, special_tokens
from quire.text.tools.dialect import Dialect
from quire.text.tools.events import Answer, answer
from quire.text.tools.format import Format, Reasoning
from quire.text.tools.registry import reasoning_format, tool_format, tool_formats
from tests.text.transcripts import FILE, TOOLS, TRANSCRIPTS, Transcript
from tests.tiny_tokenizer import byte_tokenizer

MARKERS = re.compile(
    r"<｜[^｜>]+｜>|｜DSML｜|<\|[^|>]+\|>|<\|[a-z_]+>|<[a-z_]+\|>|\[[A-Z_]+\]|</?[a-z_]+:?[a-z_]*>"
)
END = 2
CLOSERS = re.compile(rb"[\]})\"'<>]")
NUMBERS = {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "on": {"type": "boolean"}}
NODE = {
    "type": "object",
    "properties": {"v": {"type": "number"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    "required": ["v"],
    "additionalProperties": False,
}
ORDER = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog x", 7]},
        "count": NUMBERS["n"],
        "note": {"type": "string", "minLength": 1, "maxLength": 5},
        "items": {
            "type": "array",
            "maxItems": 2,
            "items": {
                "type": "object",
                "properties": NUMBERS,
                "required": ["n"],
                "additionalProperties": False,
            },
        },
        "maybe": {"type": ["string", "null"]},
        "deep": {"$ref": "#/$defs/node"},
    },
    "required": ["kind", "items"],
    "additionalProperties": False,
    "$defs": {"node": NODE},
}
FREE = {"type": "object", "properties": {"x": {"type": "string"}}}
SCHEMAS = {"order": ORDER, "now": None, "free": FREE}
ASKED = [{"type": "function", "function": {"name": n, "parameters": s or {}}} for n, s in SCHEMAS.items()]
every = pytest.mark.parametrize("form", tool_formats(), ids=lambda form: form.names[0])


class Speaker:
    """A tokenizer that has a format's markers as special tokens, or not, and a parser of that format."""

    def __init__(self, form: Format, *, special: bool):
        self.form, self.tokenizer = form, byte_tokenizer(512)
        states = form.states.values()
        texts = {text for s in states for text in (*s.on, *s.quotes, *s.writes, s.thinks)}
        found = sorted({each for text in texts for each in MARKERS.findall(text)}) if special else []
        self.tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in found])
        text = self.tokenizer.to_str()
        self.vocabulary = Vocabulary(text, self.tokenizer.get_vocab_size(), [END])
        self.special_tokens = special_tokens(self.vocabulary, text)
        self.special_ids = frozenset(t for t in self.special_tokens.values() if t is not None)
        self.dialect = Dialect(form, None, self)

    def token(self, index: int) -> str:
        return str(self.tokenizer.id_to_token(index))

    def grammar(self, *, required: bool, single: bool = False, tools: object = None) -> str:
        schemas = SCHEMAS if tools is None else tools
        return CallGrammar(self.form, schemas, self.special_tokens, required=required, single=single).source(
            "start"
        )

    def draw(self, grammar: str, seed: int, most: int = 400) -> list[int] | None:
        """Any tokens that the grammar lets pass, in a hurry to end; None if they do not."""
        choose, tokens = np.random.default_rng(seed), list[int]()
        matcher, executor = self.vocabulary.matcher(grammar), llguidance.LLExecutor(1)
        while not matcher.is_stopped() and len(tokens) < most:
            words = masks(executor, [matcher], self.vocabulary.num_words)[0]
            assert not matcher.is_error(), matcher.get_error()
            allowed = np.unpackbits(words.view(np.uint8), bitorder="little").nonzero()[0].tolist()
            assert allowed, f"no way out after {self.vocabulary.tokens.decode_str(tokens)!r}"
            if allowed == [END] or (END in allowed and choose.random() < 0.3):
                return tokens
            allowed = [t for t in allowed if t != END]
            special = [t for t in allowed if t in self.special_ids]
            closers = [t for t in allowed if CLOSERS.search(self.vocabulary.tokens.decode_bytes([t]))]
            luck = choose.random()
            among = special if special and luck < 0.3 else closers if closers and luck < 0.6 else allowed
            tokens.append(int(choose.choice(among)))
            matcher.consume_token(tokens[-1])
        return None

    def read(self, tokens: Sequence[int]) -> Answer:
        marks, pieces, run = self.dialect.marks, list[str](), list[int]()
        for token in tokens:
            if token in self.special_ids:
                pieces += [self.tokenizer.decode(run), marks.get(token, "")]
                run = []
            else:
                run.append(token)
        parser = self.dialect.parser(tools=ASKED)
        return answer([*parser.feed("".join([*pieces, self.tokenizer.decode(run)])), *parser.finish()])


def check(found: Answer) -> None:
    for call in found.calls:
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name] or {"maxProperties": 0})


def drawn(form: Format, seeds: range, *, special: bool = True) -> int:
    """How many answers that must call a tool, or one, were complete and read back."""
    speaker, num = Speaker(form, special=special), 0
    for single in (False, True):
        grammar = speaker.grammar(required=True, single=single)
        for seed in seeds:
            tokens = speaker.draw(grammar, seed)
            if tokens is None:
                continue
            found = speaker.read(tokens)
            told = speaker.tokenizer.decode(tokens, skip_special_tokens=False)
            assert found.calls and not found.text.strip(), told
            assert not single or len(found.calls) == 1, told
            check(found)
            num += 1
    return num


@every
def test_whatever_may_be_written_is_read_back_as_calls(form: Format) -> None:
    assert drawn(form, range(2)) > 0


@pytest.mark.slow
@every
def test_whatever_may_be_written_is_read_back_as_calls_at_many_draws(form: Format) -> None:
    assert drawn(form, range(100, 108)) > 4
    drawn(form, range(100, 103), special=False)  # without special tokens few end


@pytest.mark.slow
def test_text_is_free_and_calls_in_it_are_not() -> None:
    num = 0
    for form in tool_formats():
        speaker = Speaker(form, special=True)
        grammar = speaker.grammar(required=False)
        for seed in range(12):
            if (tokens := speaker.draw(grammar, seed)) is not None:
                found = speaker.read(tokens)
                check(found)
                num += len(found.calls)
    assert num > 30  # most texts have none


# Transcripts that are no calls of the tools, or not written as models are taught to: the names of what is refused.
LENIENT = {
    "hermes": "a call has its arguments before its name",
    "ernie": "arguments are JSON in a string",
    "OpenAI's form": "a function within an object",
    "llama 3 with its tag": "null instead of arguments",
    "llama 3 built-in": "a tool that was not given",
    "types by the schema": "True and 7.0, which are made true and 7",
    "pythonic values": "arguments that the schema has not, of kinds that no JSON has",
    "gpt-oss answers": "it calls nothing",
    "granite thinks": "it calls nothing",
}


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=lambda t: t.name.replace(" ", "-"))
def test_what_models_write_may_be_written(transcript: Transcript, special: bool) -> None:
    form, thinks = tool_format(transcript.tools, ()), reasoning_format(transcript.thinking, ())
    if form is None or transcript.name in LENIENT or (form.reasons and not special):
        return
    if special and FILE in transcript.calls:
        return  # what is in the file would be special tokens
    speaker = Speaker(form, special=special)
    tools = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    matcher = speaker.vocabulary.matcher(speaker.grammar(required=False, tools=tools))
    said = transcript.answer.replace("<|call|>", "").replace("<|return|>", "")
    if isinstance(thinks, Reasoning):
        said = said.rpartition(thinks.close)[2]  # thinking is free
    tokens = speaker.tokenizer.encode(said).ids
    assert matcher.try_consume_tokens(tokens) == len(tokens), speaker.tokenizer.decode(tokens)
    assert matcher.is_accepting()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hermes", '<tool_call>{"name": "nobody"'),
        ("hermes", '<tool_call>{"name": "order", "arguments": {"kind": "cow"'),
        ("hermes", "<tool_call> I think"),
        ("qwen3_coder", "<function=order><parameter=kind>cat</parameter></function>"),
        ("qwen3_coder", "<function=order><parameter=kind>cat</parameter><parameter=kind>"),
        ("pythonic", '[order(kind="cow"'),
        ("pythonic", "[order(kind='cat', count=100"),
        ("llama3_json", '{"name": "order", "parameters": []'),
        ("gemma4", "<|tool_call>call:order{count:-1"),
        ("glm45", "<tool_call>order</tool_call>"),
        ("harmony", "<|channel|>commentary to=functions.nobody"),
    ],
)
def test_what_is_no_call_cannot_be_written(name: str, said: str) -> None:
    form = tool_format(name, ())
    assert form is not None
    speaker = Speaker(form, special=True)
    matcher = speaker.vocabulary.matcher(speaker.grammar(required=False))
    tokens = speaker.tokenizer.encode(said).ids
    assert matcher.try_consume_tokens(tokens) < len(tokens)


@pytest.mark.parametrize(
    "said", ['{"name": "Bob", "age": 7}', "[1] Smith (2020)", "Hello <tool", "{}", "[nobody()]"]
)
@every
def test_other_text_is_free(form: Format, said: str) -> None:
    if form.reasons:
        said = f"<|channel|>final<|message|>{said}"
    speaker = Speaker(form, special=True)
    matcher = speaker.vocabulary.matcher(speaker.grammar(required=False))
    tokens = speaker.tokenizer.encode(said).ids
    assert matcher.try_consume_tokens(tokens) == len(tokens)
    assert matcher.is_accepting()


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"properties": {"a": {"type": "string", "pattern": "x"}}}, "pattern"),
        ({"properties": {"a": {"$ref": "#/nowhere"}}}, "nothing"),
        ({"oneOf": [{"properties": {}}]}, "oneOf"),
        ({"properties": {f"p{n}": {} for n in range(70)}}, "70 properties; at most 64"),
    ],
)
def test_what_no_literal_can_obey_is_named(schema: dict[str, object], words: str) -> None:
    form = tool_format("pythonic", ())
    assert form is not None
    with pytest.raises(InvalidRequest, match=words):
        Speaker(form, special=True).grammar(required=True, tools={"f": schema})
