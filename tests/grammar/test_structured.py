"""Structured outputs through a whole engine: whatever the demo model would say, the text is what was asked for."""

import dataclasses
import json
import re
from collections.abc import Iterator

import pytest

from benchmarks.grammars.many import Many
from quire import LLM, SamplingParams
from quire.engine.engine import Engine
from quire.errors import InvalidRequest
from quire.grammar.checker import TRY_TOKENS
from quire.types import Request, StructuredOutputsParams, Thoughts

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "ages", "kind"],
    "additionalProperties": False,
}
AS_JSON = StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True)
TAGS = {
    "structures": [{"begin": "<f>", "schema": {"enum": [12, 345]}, "end": "</f>"}],
    "triggers": ["<f"],
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", device="cpu", kv_cache_memory_bytes=64 << 20, disable_log_stats=True) as llm:
        yield llm


def texts(llm: LLM, asked: StructuredOutputsParams, **more: object) -> list[str]:
    params = SamplingParams(**{"max_tokens": 120, "structured_outputs": asked, **more})
    (output,) = llm.generate("Tell me more.", params, use_tqdm=False)
    assert {each.finish_reason for each in output.outputs} == {"stop"}
    return [each.text for each in output.outputs]


def run(engine: Engine, request: Request) -> list[int]:
    """The tokens of its only sequence."""
    tokens: list[int] = []
    engine.add(request)
    while not engine.idle:
        for output in engine.step():
            tokens = output.outputs[0].token_ids
    return list(tokens)


def check(text: str) -> None:
    value = json.loads(text)
    assert sorted(value) == ["ages", "kind", "name"] and len(value["name"]) <= 8
    assert value["kind"] in ("cat", "dog") and all(0 <= age <= 99 for age in value["ages"])


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"regex": "[a-c]{3}-[0-9]{2}"}, "[a-c]{3}-[0-9]{2}"),
        ({"choice": ["yes", 'no "way"', "ä\nb"]}, '(yes|no "way"|ä\nb)'),
        ({"grammar": 'start: "x" NUM\nNUM: /[0-9]{2}/'}, "x[0-9]{2}"),
        ({"grammar": 'root ::= "a" [0-9] "b"'}, "a[0-9]b"),
        ({"json": '{"type": "integer", "minimum": 10, "maximum": 12}'}, r"\s*1[0-2]\s*"),
    ],
)
def test_texts_are_what_was_asked_for(llm: LLM, asked: dict[str, object], pattern: str) -> None:
    for text in texts(llm, StructuredOutputsParams(**asked), n=4):
        assert re.fullmatch(pattern, text)


def test_objects_follow_their_schema_in_every_output(llm: LLM) -> None:
    found = texts(llm, AS_JSON, n=16, logprobs=1, presence_penalty=1.5, top_p=0.9)
    assert len(set(found)) > 8
    for text in found:
        check(text)


def test_random_forms_are_kept_whatever_the_other_parameters_are(llm: LLM) -> None:
    tally = Many(llm, seed=1, batch=15).run(300)
    assert not tally.bad
    assert (
        tally.counts["ended"] > 100
        and tally.counts["after thoughts"]
        and tally.counts["gone on with, and valid"]
    )


def test_an_object_may_hold_only_what_its_schema_names(llm: LLM) -> None:
    loose = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    closed = StructuredOutputsParams(
        json=loose, disable_additional_properties=True, disable_any_whitespace=True
    )
    assert {*texts(llm, closed, n=8)} <= {'{"a":true}', '{"a":false}'}


def test_tags_hold_what_their_schema_says(llm: LLM) -> None:
    inputs, said = llm.engine.inputs, "Once <f>"
    params = SamplingParams(max_tokens=40, structured_outputs=StructuredOutputsParams(structural_tag=TAGS))
    begun = (tuple(llm.get_tokenizer().encode(said, add_special_tokens=False)),)
    request = inputs.resumed(inputs.request("Hi", params, request_id="tags"), begun, frozenset())
    text = llm.get_tokenizer().decode(run(llm.engine, request), skip_special_tokens=True)
    assert re.match("Once <f>(12|345)</f>", text)


def test_a_stop_string_ends_a_text_before_its_grammar_does(llm: LLM) -> None:
    assert texts(llm, StructuredOutputsParams(regex="ab+c[0-9]{5}"), stop="c") in (["ab"], ["a" + "b" * 2])


def test_rows_without_a_grammar_are_sampled_as_if_they_were_alone(llm: LLM) -> None:
    free = SamplingParams(max_tokens=20, temperature=0)
    bound = SamplingParams(max_tokens=120, structured_outputs=AS_JSON)
    (alone,) = llm.generate("Hello", free, use_tqdm=False)
    beside, constrained = llm.generate(["Hello", "Hello"], [free, bound], use_tqdm=False)
    assert beside.outputs[0].token_ids == alone.outputs[0].token_ids
    check(constrained.outputs[0].text)


def test_what_went_on_elsewhere_is_what_it_would_have_been(llm: LLM) -> None:
    """A request with half of its outputs, as after a crash; and one that reasons first."""
    inputs, params = llm.engine.inputs, SamplingParams(max_tokens=120, seed=7, structured_outputs=AS_JSON)
    whole = inputs.request("Tell me", params, request_id="whole")
    tokens = run(llm.engine, whole)
    for cut in (1, len(tokens) // 2, len(tokens) - 1):
        again = dataclasses.replace(whole, id=f"cut-{cut}")
        rest = run(llm.engine, inputs.resumed(again, (tuple(tokens[:cut]),), frozenset()))
        assert rest == tokens


@pytest.mark.parametrize("begun", [True, False])
def test_reasoning_is_free_and_the_answer_after_it_is_not(llm: LLM, begun: bool) -> None:
    inputs, tokenizer = llm.engine.inputs, llm.get_tokenizer()
    params = SamplingParams(max_tokens=150, seed=3, structured_outputs=AS_JSON)
    request = inputs.request("Tell me", params, request_id=f"thinks-{begun}")
    assert request.grammar is not None
    grammar = dataclasses.replace(request.grammar, thoughts=Thoughts("<think>", "</think>", begun))
    said = ("" if begun else "<think>") + "Not } JSON at all.</think>"
    outputs = tuple(tokenizer.encode(said, add_special_tokens=False))
    begun_elsewhere = inputs.resumed(dataclasses.replace(request, grammar=grammar), (outputs,), frozenset())
    tokens = run(llm.engine, begun_elsewhere)
    check(tokenizer.decode(tokens[len(outputs) :], skip_special_tokens=True))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"type": "string", "format": "no-such"}}, "no-such"),
        ({"json": {"$ref": "https://example.com/schema"}}, "example.com"),
        ({"json": "{"}, "not JSON"),
        ({"json": json.dumps({"a": [[]]}).replace("[[]]", "[" * 200 + "]" * 200)}, "64 levels"),
        ({"json": '{"a":' * 30_000 + "1" + "}" * 30_000}, "JSON|levels|characters"),
        ({"json": {"enum": ["x" * 300_000]}}, "262,144"),
        ({"json": {"type": "string", "x-guidance": {"lenient": True}, "uniqueItems": 1, "if": {}}}, "if"),
        ({"regex": "("}, "unclosed group"),
        ({"regex": "a\0b"}, "NUL"),
        ({"regex": "^(?=x)y"}, "look-around"),
        ({"regex": "(" * 20_000 + "a" + ")" * 20_000}, "cannot be used"),
        ({"grammar": "start: " + "(" * 50_000}, "nested"),
        ({"grammar": "start: nothing"}, "nothing"),
        ({"structural_tag": {"type": "structural_tag", "format": {}}}, "structures"),
        ({"structural_tag": {"structures": [{"begin": "x"}], "triggers": ["<"]}}, "triggers"),
    ],
)
def test_what_cannot_be_had_is_refused_and_the_engine_goes_on(
    llm: LLM, asked: dict[str, object], words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        texts(llm, StructuredOutputsParams(**asked))
    assert texts(llm, StructuredOutputsParams(choice=["yes"])) == ["yes"]


@pytest.mark.parametrize(
    "pattern",
    [
        "((((a|b){1,999}){1,999}){1,999}c)" * 20,
        "(x+x+)+y",
        "(a|aa)+$",
        "(a|b)*a(a|b){200}",
        "(.*.*.*=){50}z",
        "((a{1,100}){1,100}){1,100}",
    ],
)
def test_patterns_that_are_slow_elsewhere_are_followed_or_refused(llm: LLM, pattern: str) -> None:
    params = SamplingParams(max_tokens=24, structured_outputs=StructuredOutputsParams(regex=pattern))
    try:
        (output,) = llm.generate("Hi", params, use_tqdm=False)
    except InvalidRequest as error:
        assert error.param == "structured_outputs"
    else:
        assert output.outputs[0].finish_reason in ("stop", "length", "error")
    assert texts(llm, StructuredOutputsParams(choice=["yes"])) == ["yes"]


def test_what_gets_too_complex_on_its_way_fails_alone(llm: LLM) -> None:
    """Beyond the tokens that a check tries."""
    late = StructuredOutputsParams(regex="[0-9]{70}((((a|b){1,999}){1,999}){1,99}c)")
    free = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)
    (alone,) = llm.generate("Hello", free, use_tqdm=False)
    bound = SamplingParams(max_tokens=150, structured_outputs=late)
    failed, beside = llm.generate(["Hi", "Hello"], [bound, free], use_tqdm=False)
    assert failed.outputs[0].finish_reason == "error" and len(failed.outputs[0].token_ids) > TRY_TOKENS
    assert beside.outputs[0].token_ids == alone.outputs[0].token_ids


def test_a_checker_that_is_killed_is_started_again(llm: LLM) -> None:
    texts(llm, StructuredOutputsParams(choice=["one"]))
    checks = llm.engine.inputs.grammars
    assert checks is not None
    checker = checks.idle.get()
    assert checker is not None
    checker.process.kill()
    checks.idle.put(checker)
    with pytest.raises(InvalidRequest, match="simplify"):
        texts(llm, StructuredOutputsParams(choice=["two"]))
    assert texts(llm, StructuredOutputsParams(choice=["two"])) == ["two"]


def test_a_token_that_other_parameters_exclude_fails_its_request_alone(llm: LLM) -> None:
    params = SamplingParams(
        max_tokens=5, structured_outputs=StructuredOutputsParams(choice=["yes"]), allowed_token_ids=[7]
    )
    (output,) = llm.generate("Hi", params, use_tqdm=False)
    assert output.outputs[0].finish_reason == "error"


@pytest.mark.parametrize(
    "fields",
    [{}, {"regex": "a", "choice": ["b"]}, {"choice": []}, {"choice": [1]}, {"regex": ""}, {"json": 5}],
)
def test_exactly_one_form_is_named(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        StructuredOutputsParams(**fields)


def test_a_text_that_goes_on_after_its_end_has_no_form() -> None:
    with pytest.raises(InvalidRequest, match="ignore_eos"):
        SamplingParams(ignore_eos=True, structured_outputs=StructuredOutputsParams(regex="a"))
