"""What the demo model learns from: reproducible, true, free of what is held out, and as chat templates write it."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from examples.train_demo import skills
from examples.train_demo.data import (
    CONTEXT,
    END,
    MARKS,
    TEMPLATE,
    VOCAB,
    batch,
    document,
    encode,
    template,
    train_tokenizer,
    write,
)
from examples.train_demo.skills import SKILLS, SLOT, VALUES, WORLD, Example, Writer, fill, held_out, solve
from quire.text.chat import ChatTemplate

EXAMPLES = Path(skills.__file__).parent
SLOTS = {"a": r"\d+", "b": r"\d+", "sign": "[-+x*/]", "word": "[a-z]+", "fields": "[a-z_, ]+"}
SLOTS |= {"spoken": "|".join(skills.SPOKEN.values())}
SIGNS = {word: sign for sign, word in skills.SPOKEN.items()} | {"*": "x"}
EMPTY = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder, seed=0, count=400)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def examples(seed: str, count: int, skill: str | None = None, test: bool = False) -> Iterator[Example]:
    writer = Writer(f"{seed} {skill}", test)
    return (writer.example(skill) for _ in range(count))


def questions(example: Example) -> list[tuple[str, str]]:
    """What the user says and the assistant answers at once."""
    pairs = pairwise(example.messages)
    return [(one["content"], two["content"]) for one, two in pairs if one["role"] == "user"]


def same(text: str) -> str:
    """Without what `Writer.casual` does to it."""
    greetings = (manner.removesuffix("{}") for manner in WORLD["manners"] if manner.endswith("{}"))
    greeting = next((greeting for greeting in greetings if text.startswith(greeting)), "")
    return re.sub(r"( Please\.| Thanks!)$", "", text.removeprefix(greeting)).lower().rstrip("?.!")


@cache
def pattern(template: str) -> re.Pattern[str]:
    """Reads the values of its slots from a filled template."""
    parts = SLOT.split(template)
    texts = [re.sub(r"\b([Aa])\\ $", r"\1n?\\ ", re.escape(text)) for text in parts[::2]]
    names = parts[1::2]
    groups = [
        f"(?P={name})" if name in names[:i] else f"(?P<{name}>{SLOTS.get(name, '.+?')})"
        for i, name in enumerate(names)
    ]
    return re.compile(
        "".join(x for pair in zip(texts, [*groups, ""], strict=True) for x in pair), re.I | re.S
    )


def read(text: str, *templates: str) -> list[dict[str, str]]:
    return [found.groupdict() for each in templates if (found := pattern(each).fullmatch(text))]


def problems(user: str) -> list[str]:
    """The arithmetic that the text asks for, as `Turn.key` writes it."""
    found = []
    for sign, pairs in WORLD["problems"].items():
        for values in read(user, *(question for question, _ in pairs)):
            shown = values.get("sign") or values.get("spoken") or sign
            found.append(f"{values['a']}{SIGNS.get(shown, shown)}{values['b']}")
    return found


@cache
def facts() -> dict[str, set[str]]:
    """A question, in whatever form -> the questions that it may be."""
    found = defaultdict(set)
    for topic in WORLD["facts"]:
        for question, *_ in [*topic["questions"], *(topic.get("follow_ups") or [])]:
            for row in topic["rows"]:
                key = fill(question, row)
                found[same(key)].add(key)
    return found


def memory(user: str, answer: str) -> list[str]:
    found = []
    for entry in WORLD["memory"]:
        asked = [ask + answer for ask in entry["ask"] if same(ask) == same(user)]
        found += [user] if asked and answer == entry["unknown"] else asked
        for values in read(user, *entry["say"]):
            found += [fill(entry["system"], values)] if fill(entry["reply"], values) == answer else []
    return found


def keys(skill: str, user: str, answer: str) -> list[str]:
    """What decides whether this exchange is held out: found in its text, not taken from the writer."""
    if skill in ("sums", "arithmetic"):
        return problems(user)
    if skill == "facts":
        return list(facts()[same(user)])
    if skill == "memory":
        return memory(user, answer)
    if skill == "extract":
        return [values["text"] for values in read(user, *WORLD["extract_requests"])]
    if skill == "strings":
        tasks = WORLD["strings"].items()
        return [f"{task} {values['word']}" for task, (asks, _) in tasks for values in read(user, *asks)]
    return [user]


@pytest.mark.parametrize("skill", [skill for skill in SKILLS if skill != "styles"])
def test_what_is_held_out_is_asked_in_tests_only(skill: str) -> None:
    for test in (False, True):
        for example in examples("held out", 250, skill, test):
            last = max(i for i, message in enumerate(example.messages) if message["role"] == "user")
            user, answer = (message["content"] for message in example.messages[last : last + 2])
            found = keys(skill, user, answer)
            assert found, user
            assert (any if test else all)(held_out(key) for key in found) == test, (user, found)


def test_no_text_asks_for_what_is_held_out() -> None:
    """In all that is written for training: earlier turns, and text without a template."""
    asked = 0
    for pieces in islice(write("training"), 4000):
        text = "".join(text for text, _ in pieces)
        users = re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", text, re.S)
        for user in users or [pieces[0][0], re.split(" = | is ", text)[0]]:
            found = [*problems(user), *facts().get(same(user), [])]
            asked += bool(found)
            assert not found or not all(map(held_out, found)), user
    assert asked > 2000


def test_a_seed_is_a_text() -> None:
    one, same, other = (list(islice(write(seed), 100)) for seed in ("1", "1", "2"))
    assert one == same
    assert one != other


def test_every_skill_is_written() -> None:
    found = {example.skill for example in examples("any", 400)}
    assert found == set(SKILLS)
    for example in examples("many", 3000):
        assert example.messages[-1]["role"] == "assistant"
        assert example.messages[-1]["content"] or example.messages[-1]["tool_calls"]
        text = "".join(message["content"] for message in example.messages)
        assert "{" not in text.replace('{"', "").replace("{}", "") or example.skill in ("extract", "tools")


def test_every_template_can_be_filled() -> None:
    for topic in WORLD["facts"]:
        templates = [
            text for texts in [*topic["questions"], *(topic.get("follow_ups") or [])] for text in texts
        ]
        for row in topic["rows"]:
            for text in templates:
                assert fill(text, row)
    for tool in WORLD["tools"]:
        parameters = set(tool["parameters"])
        for text in tool["requests"]:
            assert set(SLOT.findall(text)) == parameters, text
        for text in tool["pairs"]:
            slots = set(SLOT.findall(text))
            assert {slot.rstrip("2") for slot in slots} == parameters, text
            assert slots != parameters, text
        assert set(SLOT.findall(tool["answer"])) <= parameters | set(tool["result"])
        assert set(SLOT.findall(tool["missing"])) <= parameters
    for entry in WORLD["memory"]:
        told = set(SLOT.findall(entry["system"]))
        for text in [entry["answer"], entry["word"], entry["reply"], *entry["say"]]:
            assert set(SLOT.findall(text)) <= told, text
    for entry in WORLD["extract"]:
        assert all(set(SLOT.findall(text)) <= set(entry["fields"]) for text in entry["sentences"])
        assert all(kind in VALUES or kind.rstrip("#") in VALUES for kind in entry["fields"].values())


@pytest.mark.parametrize(
    "skill", ["facts", "lists", "unknown", "chat", "sums", "arithmetic", "counting", "strings"]
)
def test_a_question_has_one_answer(skill: str) -> None:
    """In whatever form it is asked, without a system prompt and without earlier turns."""
    found = defaultdict(set)
    for example in examples("once", 3000, skill):
        if len(example.messages) == 2:
            final = example.messages[1]
            found[same(questions(example)[0][0])].add(final["content"])
            thought = final.get("reasoning_content", "")
            assert not thought or example.thinking
    assert {user: answers for user, answers in found.items() if len(answers) > 1} == {}


def test_a_fact_has_one_answer() -> None:
    """All of them, in one sentence and in one word."""
    found = defaultdict(set)
    for topic in WORLD["facts"]:
        for row in topic["rows"]:
            for texts in topic["questions"]:
                user, answer, word = (fill(text, row) for text in texts)
                assert len(word.split()) == 1, word
                found[same(user)].add((answer, word))
    assert {user: answers for user, answers in found.items() if len(answers) > 1} == {}


def test_text_without_a_template_needs_no_history() -> None:
    """Such as "And of Peru?", which has many answers."""
    ends = {
        same(fill(follow[0], row))
        for t in WORLD["facts"]
        for follow in t.get("follow_ups") or []
        for row in t["rows"]
    }
    alone = [pieces[0][0] for pieces in islice(write("alone"), 12000) if not pieces[0][0].startswith("<|im_")]
    assert len(alone) > 300
    assert [text for text in alone if same(text) in ends] == []


def check_columns(steps: list[str], a: int, sign: str, b: int, result: int) -> None:
    """Each step is true and follows from the one before; their digits are those of the result."""
    carry, digits = 0, []
    for place, line in enumerate(steps):
        step = re.fullmatch(
            r"(\d) (.) (\d)(?: ([+-]) (\d))? = (-?\d+)(?:, write (\d), carry (\d)|, borrow (1): (\d+))?", line
        )
        assert step, line
        p, shown, q, carry_sign, carried, value, digit, carry_next, borrowed, rest = step.groups()
        assert (int(p), shown) == (a // 10**place % 10, sign)
        assert int(q) == (b if sign == "x" else b // 10**place % 10)
        assert int(carried or 0) == carry
        assert carry_sign in (None, "-" if sign == "-" else "+")
        right = {"+": int(p) + int(q), "-": int(p) - int(q), "x": int(p) * int(q)}[sign]
        assert int(value) == right + (-carry if sign == "-" else carry)
        assert (int(value) < 0) == bool(borrowed)
        assert (int(value) > 9) == bool(digit)
        digits.append(int(rest or digit or value))
        assert not rest or int(rest) == int(value) + 10
        carry = int(carry_next or borrowed or 0)
    assert sum(d * 10**place for place, d in enumerate([*digits, carry])) == result


def test_thoughts_end_in_the_true_result() -> None:
    random = Random(0)
    for _ in range(3000):
        sign, top = random.choice("+-x/"), random.choice([10, 100, 1000])
        a, b = random.randrange(top), random.randrange(1, 10) if sign in "x/" else random.randrange(top)
        a = a // 10 * b if sign == "/" else a
        result, thought = solve(a, sign, b)
        assert result == {"+": a + b, "-": a - b, "x": a * b, "/": a // max(b, 1)}[sign]
        first, *steps, last = thought.split("\n")
        assert last == str(result)
        if sign == "/":
            assert (first, steps) == (f"{b} x {result} = {a}", [])
            assert b * result == a
            continue
        if result < 0:
            assert first == f"{b} is more than {a}, so below zero"
            a, b, first, *steps = b, a, *steps
        assert first == f"{a} {sign} {b}"
        check_columns(steps, a, sign, b, abs(result))


def test_arithmetic_is_right() -> None:
    """What a conversation says is what Python says."""
    for skill in ("sums", "arithmetic"):
        for example in examples("right", 500, skill):
            user, answer = questions(example)[-1]
            [key] = set(problems(user))
            a, sign, b = re.fullmatch(r"(\d+)(.)(\d+)", key).groups()  # type: ignore[union-attr]
            a, b = int(a), int(b)
            result = {"+": a + b, "-": a - b, "x": a * b, "/": a // max(b, 1)}[sign]
            assert re.findall(r"-?\d+", answer)[-1] == str(result), (user, answer)
            thought = example.messages[-1].get("reasoning_content")
            assert bool(thought) == example.thinking
            assert not thought or thought.split("\n")[-1] == str(result)


def test_documents_are_those_of_the_chat_template(folder: Path) -> None:
    ours, theirs, form = ChatTemplate(TEMPLATE), AutoTokenizer.from_pretrained(folder), template()
    for example in examples("templates", 250):
        options = {"tools": example.tools or None, "enable_thinking": example.thinking}
        *head, (answer, learned) = document(example, form)
        prompt, before = "".join(text for text, _ in head), example.messages[:-1]
        assert prompt == ours.render(before, add_generation_prompt=True, **options)
        assert prompt == theirs.apply_chat_template(
            before, tokenize=False, add_generation_prompt=True, **options
        )
        assert learned
        assert prompt.endswith("<|im_start|>assistant\n" + ("" if example.thinking else EMPTY))
        whole = prompt.removesuffix(EMPTY) + answer + "\n"
        assert whole == ours.render(example.messages, add_generation_prompt=False, **options)
        assert whole == theirs.apply_chat_template(example.messages, tokenize=False, **options)


def test_targets_are_what_is_learned(tokenizer: Tokenizer) -> None:
    """Pieces give the tokens of the whole; each learned token is foreseen from the one before it."""
    documents = list(islice(write("targets"), 400))
    for pieces, (tokens, targets) in zip(documents, encode(tokenizer, documents), strict=True):
        whole = tokenizer.encode("".join(text for text, _ in pieces), add_special_tokens=False).ids
        assert tokens.tolist() == whole[:-1]
        assert not pieces[0][1]
        assert all(target in (-100, token) for target, token in zip(targets, whole[1:], strict=True))
        learned = "".join(text for text, is_learned in pieces if is_learned)
        assert tokenizer.decode(targets[targets >= 0].tolist(), skip_special_tokens=False) == learned
        assert learned.endswith(("<|im_end|>", END))


def said(*contents: str | tuple[str, str], thinking: bool = True) -> Example:
    """Answers to questions; a pair is a thought and an answer."""
    example = Example("sums", thinking)
    for content in contents:
        thought, answer = content if isinstance(content, tuple) else ("", content)
        example.say("user", "What?")
        example.say("assistant", answer, **({"reasoning_content": thought} if thought else {}))
    return example


def test_answers_whose_thought_is_left_out_are_not_learned() -> None:
    example = said(("hm", "one"), "two", ("hmm", "three"), "four", ("h", "five"))
    pieces = document(example, template())
    assert [text for text, learned in pieces if learned] == [
        "two<|im_end|>",
        "four<|im_end|>",
        "<think>\nh\n</think>\n\nfive<|im_end|>",
    ]
    assert "hm" not in "".join(text for text, _ in pieces)


def test_calls_of_earlier_steps_are_learned() -> None:
    example = said("Hi.")
    example.say("user", "How late is it?")
    call: dict[str, Any] = {"type": "function", "function": {"name": "clock", "arguments": {"city": "Rome"}}}
    example.say("assistant", "", tool_calls=[call])
    example.say("tool", '{"time": "9:00"}')
    example.say("assistant", "It is 9:00.")
    learned = [text for text, is_learned in document(example, template()) if is_learned]
    called = '<tool_call>\n{"name": "clock", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
    assert learned == ["Hi.<|im_end|>", called, "It is 9:00.<|im_end|>"]


def test_a_problem_is_never_learned_without_its_thought() -> None:
    """After the same prompt, that is: one that allows thinking."""
    form, thoughts = template(), 0
    for example in examples("problems", 3000):
        for (before, _), (text, learned) in pairwise(document(example, form)):
            user = re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", before, re.S)[-1:]
            if learned and user and problems(user[0]) and before.endswith("assistant\n"):
                thoughts += 1
                assert text.startswith("<think>\n"), (example.thinking, user, text)
    assert thoughts > 100


def test_the_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() <= VOCAB
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.chat_template == TEMPLATE
    assert theirs.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert theirs.eos_token_id == 2
    for text in ("Ünïcode 你好 \U0001f600\n\t  end ", "12345 + 678", *MARKS):
        ids = tokenizer.encode(text).ids
        assert ids == theirs(text).input_ids
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("12345").ids) == 5
    assert {len(tokenizer.encode(mark).ids) for mark in MARKS} == {1}


def test_batches_are_packed(folder: Path, tokenizer: Tokenizer) -> None:
    found = batch(folder, "packed", rows=3)
    assert found.shape == (3, 3, CONTEXT)
    assert np.array_equal(found, batch(folder, "packed", rows=3))
    assert not np.array_equal(found, batch(folder, "other", rows=3))
    tokens, targets, documents = found
    assert (documents >= 0).mean() > 0.95
    assert (targets[documents < 0] == -100).all()
    stream = encode(tokenizer, list(islice(write("packed"), 600)))
    for number in range(documents.max() + 1):
        places = np.argwhere(documents == number)
        assert len(set(places[:, 0])) == 1
        assert (np.diff(places[:, 1]) == 1).all()
        own = tokens[documents == number], targets[documents == number]
        assert any(all(map(np.array_equal, own, written)) for written in stream), number  # in order


def lines_of_code(path: Path) -> int:
    """Without blank lines, comments and docstrings."""
    tree, text = ast.parse(path.read_text()), path.read_text().splitlines()
    bodies = [
        node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    firsts = [
        body[0]
        for body in bodies
        if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    ]
    prose = {line for first in firsts for line in range(first.lineno, (first.end_lineno or 0) + 1)}
    return sum(
        line not in prose and not words.startswith("#") and words != ""
        for line, words in enumerate(map(str.strip, text), start=1)
    )


def test_size() -> None:
    """The example can be read in one sitting."""
    sizes = {path.name: lines_of_code(path) for path in EXAMPLES.glob("*.py")}
    assert sum(sizes.values()) < 620, sizes
