"""Thoughts end within their budget, whatever is drawn, and wherever and however often a sequence begins again."""

import dataclasses
import random
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from quire import LLM, SamplingParams
from quire.errors import InvalidRequest
from quire.grammar.matchers import MOST_PENDING, Matchers
from quire.text.tokenizer import Tokenizer
from quire.text.tools.dialect import ANALYSIS, END, FINAL, Dialect
from quire.text.tools.events import answer
from quire.text.tools.registry import reasonings
from quire.types import Grammar, RequestOutput, StructuredOutputsParams, ThinkingBudget, Turn
from tests.grammar.test_structured import AS_JSON, check, run
from tests.tree import PACKAGE

WORDS = ["The", " sea", " is", " wide", ".", "!", "\n", "3.", "1", " <", "think", " >", "ä"]
SPECIAL = ["<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<think>", "</think>", "[THINK]", "[/THINK]"]
FORMATS = {each.names[0]: each for each in reasonings()}
SUM = [{"role": "user", "content": "What is 17 + 25?"}]
THINK, CLOSE = {"enable_thinking": True}, 4091  # </think>
NEVER = {CLOSE: -100}  # it is closed only where nothing else may be drawn
OPTIONS = {"model": "demo", "device": "cpu", "disable_log_stats": True, "kv_cache_memory_bytes": 64 << 20}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(**OPTIONS) as llm:
        yield llm


@cache
def tokenizer() -> Tokenizer:
    backend = Backend.from_file(str(PACKAGE / "demo" / "tokenizer.json"))
    backend.add_special_tokens(SPECIAL)
    return Tokenizer(backend)


def ids(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False)


def read(tokens: list[int]) -> str:
    return tokenizer().decode(tokens, skip_special_tokens=False)


def matchers() -> Matchers:
    return Matchers(lambda: (tokenizer(), [2]), tokenizer().vocab_size, 1)


def bounded(name: str, num_tokens: int, prompt: str = "") -> tuple[Dialect, Grammar]:
    dialect = Dialect(None, FORMATS[name], None)
    found = dialect.bounds(prompt)
    assert found is not None
    return dialect, Grammar(None, budget=ThinkingBudget(num_tokens, found[0], tuple(ids(found[1]))))


def forced(among: Matchers, seq: int) -> int | None:
    """The token that must come next; None if any may."""
    if (allowed := among.allowed([seq])) is None:
        return None
    bits = np.unpackbits(allowed.words.view(np.uint8), axis=1, bitorder="little")
    (token,) = np.flatnonzero(bits[0])
    return int(token)


def opening(name: str) -> str:
    return FORMATS[name].open if name != "harmony" else ANALYSIS


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    num_tokens=st.integers(0, 60),
    begun=st.booleans(),
    closes=st.sampled_from([0.0, 0.05]),
    seed=st.integers(0, 99),
)
def test_whatever_is_drawn_an_answer_follows(
    name: str, num_tokens: int, begun: bool, closes: float, seed: int
) -> None:
    prompt = f"<|start|>assistant{opening(name)}" if begun else "<|start|>assistant"
    dialect, grammar = bounded(name, num_tokens, prompt)
    close = FORMATS[name].close if name != "harmony" else END + "<|start|>assistant" + FINAL
    rng, among, musts = random.Random(seed), matchers(), list[int | None]()
    todo, tokens = [] if begun else ids(opening(name)), list[int]()
    among.prepare(grammar).result()
    among.register(0, grammar)
    among.begin(0, [])
    while len(tokens) < num_tokens + 40:
        musts.append(forced(among, 0))
        if musts[-1] is None and not todo:
            todo = ids(close if close not in read(tokens) and rng.random() < closes else rng.choice(WORDS))
        tokens.append(todo.pop(0) if musts[-1] is None else musts[-1])
        among.drew([0], lambda drawn=tokens[-1:]: drawn)
    text = read(tokens)
    _, _, after = text.partition(close)
    assert text.count(close) == 1
    end = next(n for n in range(len(tokens)) if close in read(tokens[:n]))
    assert end - (0 if begun else len(ids(opening(name)))) <= num_tokens + len(grammar.budget.closing)
    parser = dialect.parser(prompt=prompt)
    assert answer([*parser.feed(text), *parser.finish()]).text.strip() == after.strip() != ""
    for cut in range(len(tokens)):
        among.begin(0, tokens[:cut])
        assert forced(among, 0) == musts[cut]


@pytest.mark.parametrize(
    ("said", "num_tokens"),
    [
        ([".", "\n"] * 10, 18),
        (([" sea"] * 18 + [".", " The"]), 19),
        ([" sea"] * 18 + ["\n", "The"], 19),
        ([" sea"] * 20, 20),
        (["3."] * 20, 20),  # not the end of a sentence
    ],
)
def test_the_last_tenth_ends_with_a_sentence_or_a_line(said: list[str], num_tokens: int) -> None:
    _, grammar = bounded("think", 20, "<think>\n")
    among, tokens = matchers(), [token for word in said for token in ids(word)]
    assert len(tokens) >= 20
    among.prepare(grammar).result()
    among.register(0, grammar)
    ends = []
    for length in range(21):
        among.begin(0, tokens[:length])
        ends.append(forced(among, 0))
    assert [length for length, token in enumerate(ends) if token is not None][0] == num_tokens
    assert ends[num_tokens] == ids("</think>" if tokens[num_tokens - 1 :][:1] == ids("\n") else "\n")[0]


def test_masks_are_made_only_near_the_end() -> None:
    """Until then steps are computed as without a budget, and nobody waits for the newest tokens."""
    _, grammar = bounded("think", 100, "<think>\n")
    among, (word,) = matchers(), ids("1")
    among.prepare(grammar).result()
    among.register(0, grammar)
    among.begin(0, [])
    waited = []

    def newest(number: int) -> list[int]:
        waited.append(number)
        return [word]

    for number in range(90 - MOST_PENDING):
        assert not among.concerns([0]) and among.allowed([0]) is None
        among.drew([0], lambda number=number: newest(number))
        assert len(waited) <= max(0, number + 1 - MOST_PENDING)
    for _ in range(90 - MOST_PENDING, 100):
        assert among.allowed([0]) is None
        among.drew([0], lambda: [word])
    for token in ids("\n</think>\n\n"):
        assert among.concerns([0]) and forced(among, 0) == token
        among.drew([0], lambda token=token: [token])
    assert forced(among, 0) is None and not among.concerns([0])


def test_what_does_not_think_is_left_alone() -> None:
    _, grammar = bounded("think", 0)
    among = matchers()
    among.prepare(grammar).result()
    among.register(0, grammar)
    for said, thinks in (("", False), ("<think>", True), ("\n<think>", True), ("The <think>", False)):
        among.begin(0, ids(said))
        assert (forced(among, 0) is not None) == thinks


def test_analysis_that_begins_again_is_counted_on() -> None:
    _, grammar = bounded("harmony", 20, "<|start|>assistant")
    among, said = matchers(), [*ids(ANALYSIS), *ids("1") * 12, *ids(f"{END}<|start|>assistant{ANALYSIS}")]
    among.prepare(grammar).result()
    among.register(0, grammar)
    among.begin(0, [*said, *ids("1") * 7])
    assert forced(among, 0) is None
    among.begin(0, [*said, *ids("1") * 8])
    assert forced(among, 0) == ids(END)[0]
    among.begin(0, [*said[:-2], *ids("final<|message|>"), *ids("1") * 30])
    assert forced(among, 0) is None


def params(num_tokens: int | None, **more: object) -> SamplingParams:
    return SamplingParams(
        **{"max_tokens": 300, "thinking_token_budget": num_tokens, "temperature": 0, "seed": 1, **more}
    )


def chat(llm: LLM, num_tokens: int | None, **more: object) -> RequestOutput:
    """The model opens its thoughts itself."""
    (output,) = llm.chat(SUM, params(num_tokens, **more), chat_template_kwargs=THINK, use_tqdm=False)
    return output


def begun(llm: LLM) -> str:
    """The same prompt with thoughts that have begun."""
    return llm.engine.inputs.chat_prompt(SUM, None, add_generation_prompt=True, **THINK) + "<think>\n"


@pytest.mark.parametrize("num_tokens", [0, 1, 20, 100])
def test_every_output_answers(llm: LLM, num_tokens: int) -> None:
    asked = params(num_tokens, n=4, temperature=1, logit_bias=NEVER, min_tokens=num_tokens, logprobs=1)
    (output,) = llm.generate(begun(llm), asked, use_tqdm=False)
    for each, read in zip(output.outputs, llm.answers(output), strict=True):
        thought = each.token_ids.index(CLOSE)
        assert num_tokens * 0.9 <= thought <= num_tokens + 1 and each.token_ids.count(CLOSE) == 1
        assert each.finish_reason == "stop" and read.text
        assert each.logprobs is not None and len(each.logprobs) == len(each.token_ids)


def test_a_budget_that_is_not_used_up_changes_nothing(llm: LLM) -> None:
    free = chat(llm, None)
    assert chat(llm, 1000).outputs[0].token_ids == free.outputs[0].token_ids
    assert chat(llm, -1).outputs[0].token_ids == free.outputs[0].token_ids


def test_then_the_grammar_holds(llm: LLM) -> None:
    output = chat(llm, 30, structured_outputs=AS_JSON, logit_bias=NEVER)
    assert 28 <= output.outputs[0].token_ids.index(CLOSE) <= 32
    check(llm.answers(output)[0].text)


def test_what_went_on_elsewhere_is_what_it_would_have_been(llm: LLM) -> None:
    inputs, asked = llm.engine.inputs, params(25, max_tokens=100, temperature=1, logit_bias=NEVER)
    whole = inputs.request(begun(llm), asked, request_id="whole", turn=Turn())
    tokens = run(llm.engine, whole)
    assert CLOSE in tokens
    for cut in range(1, len(tokens), 3):
        again = inputs.resumed(dataclasses.replace(whole, id=f"{cut}"), (tuple(tokens[:cut]),), frozenset())
        assert run(llm.engine, again) == tokens


def test_a_plain_prompt_that_ends_with_the_marker(llm: LLM) -> None:
    asked = params(5, max_tokens=40, logit_bias=NEVER)
    for prompt in ("Hm. <think>\n", llm.get_tokenizer().encode("Hm. <think>\n", add_special_tokens=False)):
        (output,) = llm.generate(prompt, asked, use_tqdm=False)
        assert output.outputs[0].token_ids.index(CLOSE) <= 6


def test_what_cannot_be_had_is_refused(llm: LLM) -> None:
    for wrong in (-2, 1.5, True):
        with pytest.raises(InvalidRequest, match="thinking_token_budget"):
            SamplingParams(thinking_token_budget=wrong)
    with (
        LLM(**OPTIONS, reasoning_parser="none") as other,
        pytest.raises(InvalidRequest, match="reasoning_parser"),
    ):
        chat(other, 5)
    output = chat(llm, 0, allowed_token_ids=[4090])
    assert output.outputs[0].finish_reason == "error"


def tokens_of(*beside: SamplingParams, **options: object) -> tuple[list[list[int]], int]:
    """Of requests with budgets beside one without, and others that do not count; and preemptions."""
    asked = [
        params(budget, max_tokens=80, n=2, temperature=1, logit_bias=NEVER, min_tokens=70)
        for budget in (None, 0, 12, 60)
    ]
    with LLM(**{**OPTIONS, "dtype": "float32", **options}) as llm:
        found = llm.generate([begun(llm)] * (len(asked) + len(beside)), [*asked, *beside], use_tqdm=False)
        outputs = [each.token_ids for output in found[: len(asked)] for each in output.outputs]
        assert [CLOSE in each for each in outputs] == [False] * 2 + [True] * 6
        return outputs, llm.engine.core.scheduler.num_preemptions


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    return tokens_of()[0]


def test_overlapping_steps(alone: list[list[int]]) -> None:
    assert tokens_of(async_scheduling=True)[0] == alone


def test_beside_a_grammar_whose_masks_every_step_needs(alone: list[list[int]]) -> None:
    letters = SamplingParams(max_tokens=100, structured_outputs=StructuredOutputsParams(regex="[a-z]{400}"))
    assert tokens_of(letters)[0] == alone


def test_preemption(alone: list[list[int]]) -> None:
    found, num_preemptions = tokens_of(kv_cache_memory_bytes=1 << 20, max_model_len=125)
    assert found == alone and num_preemptions > 0


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_several_processes(alone: list[list[int]], axis: str) -> None:
    assert tokens_of(**{axis: 2})[0] == alone


def test_what_is_foreseen_is_what_is_allowed() -> None:
    """Masks are made in a thread beside a forward pass; what is asked for then may be less, or nothing any more."""
    _, grammar = bounded("think", 0, "<think>")
    found, alone = matchers(), matchers()
    for each in (found, alone):
        for seq in range(3):
            each.register(seq, grammar)
            each.begin(seq, [])
    for step, asked in enumerate(([0, 1, 2], [2], [0, 1])):
        found.foresee([0, 1, 2])
        got, want = found.allowed(asked), alone.allowed(asked)
        assert got is not None and want is not None and got.rows == want.rows
        assert np.array_equal(got.words, want.words)
        drawn = [grammar.budget.closing[step > 0]] * len(asked)
        for each in (found, alone):
            each.drew(asked, lambda drawn=drawn: drawn)
    found.foresee([0, 1, 2])
    for seq in range(3):
        found.forget(seq)
    found.allowed([0, 1, 2])
    assert not found.places and not found.concerns([0, 1, 2])
