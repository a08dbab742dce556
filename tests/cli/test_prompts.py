"""Prompts of exact lengths, counted by real tokenizers, and prompts of files."""

import asyncio
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from quire.checkpoint.source import resolve
from quire.cli.calls import Question
from quire.cli.prompts import LocalTokens, Maker
from quire.cli.workload import Shape
from quire.errors import ConfigError
from quire.text.tokenizer import Tokenizer


def demo() -> Tokenizer:
    return Tokenizer.load(resolve("demo").folder)


def byte_backend(*, begin: bool = False) -> Backend:
    """A token for each byte: no word is one token. `begin`: with one before the text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if begin:
        backend.add_special_tokens(["<s>"])
        special = [("<s>", backend.token_to_id("<s>"))]
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=special)
    return backend


def of_bytes(*, begin: bool = False) -> Tokenizer:
    return Tokenizer(byte_backend(begin=begin))


def of_pairs() -> Tokenizer:
    """Two tokens for every word: no odd number of them."""
    backend = Backend(models.BPE(vocab={"x": 0, "y": 1}, merges=[]))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"\s*[a-z]+\s*"), "xy")]  # whatever the word
    )
    return Tokenizer(backend)


TOKENIZERS = {"demo": demo, "bytes": of_bytes}


def make(tokenizer: Tokenizer, *, special: bool = True) -> Maker:
    return Maker(LocalTokens(tokenizer), special=special)


def fresh(
    maker: Maker, input_len: int, count: int = 20, prefix_len: int = 0, seed: int = 0, ratio: float = 0.0
) -> list[Question]:
    shape = Shape(input_len=input_len, output_len=9, num_prompts=count, range_ratio=ratio)
    return asyncio.run(maker.fresh(shape, prefix_len, random.Random(seed)))


def common(texts: Sequence[str]) -> int:
    """How many characters all begin with."""
    return next((i for i, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1), 0)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("length", [1, 2, 17, 300])
def test_prompts_have_exactly_the_asked_number_of_tokens(name: str, length: int) -> None:
    tokenizer = TOKENIZERS[name]()
    found = fresh(make(tokenizer), length)
    assert [len(tokenizer.encode(q.prompt)) for q in found] == [length] * 20
    assert all((q.input_len, q.output_len) == (length, 9) for q in found)


def test_prompts_differ() -> None:
    assert len({q.prompt for q in fresh(make(demo()), 30, count=100)}) == 100


def test_special_tokens_count_where_the_server_adds_them() -> None:
    tokenizer = of_bytes(begin=True)
    assert len(tokenizer.encode("")) == 1
    for special in (True, False):
        found = fresh(make(tokenizer, special=special), 12)
        assert {len(tokenizer.encode(q.prompt, add_special_tokens=special)) for q in found} == {12}
    with pytest.raises(ConfigError, match="1 special ones before it"):
        fresh(make(tokenizer), 1)


def test_ranged_lengths_are_exact_too() -> None:
    tokenizer = demo()
    found = fresh(make(tokenizer), 20, count=60, ratio=0.5)
    assert [len(tokenizer.encode(q.prompt)) for q in found] == [q.input_len for q in found]
    assert min(q.input_len for q in found) < 14
    assert max(q.input_len for q in found) > 26
    assert {q.output_len for q in found} == set(range(4, 14))


def test_prefixes_are_shared_and_count() -> None:
    tokenizer = demo()
    found = fresh(make(tokenizer), 10, prefix_len=40)
    assert {len(tokenizer.encode(q.prompt)) for q in found} == {50}
    prefix = found[0].prompt[: common([q.prompt for q in found])]
    assert len(tokenizer.encode(prefix)) == pytest.approx(40, abs=2)


def test_a_seed_makes_the_same_again() -> None:
    maker = make(demo())
    assert fresh(maker, 30, ratio=0.3, seed=5) == fresh(maker, 30, ratio=0.3, seed=5)
    assert fresh(maker, 30, ratio=0.3, seed=5) != fresh(maker, 30, ratio=0.3, seed=6)


def test_repeated_prefixes() -> None:
    tokenizer = demo()
    maker, shape = make(tokenizer), Shape(input_len=8, output_len=5, num_prompts=14)
    found = asyncio.run(maker.sharing(shape, 32, 4, random.Random(0)))
    assert len(found) == 12  # 3 for each
    assert {len(tokenizer.encode(q.prompt)) for q in found} == {40}
    begins = [q.prompt[:30] for q in found]
    assert sorted(begins.count(begin) for begin in set(begins)) == [3] * 4
    assert begins != sorted(begins)
    with pytest.raises(ConfigError, match="prefix_repetition_num_prefixes is 15"):
        asyncio.run(maker.sharing(shape, 32, 15, random.Random(0)))


def test_a_length_that_never_fits_is_refused() -> None:
    with pytest.raises(ConfigError, match="no prompt of exactly 3 tokens"):
        fresh(make(of_pairs()), 3)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "one", "output_tokens": 3}\n\n{"prompt": "two", "output_tokens": 4, "x": 0}\n'
    )
    maker = make(demo())
    assert sorted(q.prompt for q in maker.of_file(file, 2, 7, random.Random(0))) == ["one", "two"]
    assert {q.output_len for q in maker.of_file(file, 2, 7, random.Random(0))} == {7}
    again = maker.of_file(file, 9, -1, random.Random(0))
    assert len(again) == 9
    assert {(q.prompt, q.output_len) for q in again} == {("one", 3), ("two", 4)}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: "),
        ("3", "line 2: Expected `object`"),
        ('{"text": "x"}', "line 2: .*`prompt`"),
        ('{"prompt": ""}', "line 2: prompt must not be empty"),
        ('{"prompt": "x"}', "line 2: .*--custom-output-len; they are 'x' and None"),
        ('{"prompt": "x", "output_tokens": 0}', "line 2: .* and 0"),
    ],
)
def test_lines_that_cannot_be_used_are_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one", "output_tokens": 3}\n' + line)
    with pytest.raises(ConfigError, match=message):
        make(demo()).of_file(file, 2, -1, random.Random(0))


def test_an_empty_file_has_no_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n")
    with pytest.raises(ConfigError, match="no prompts that can be used"):
        make(demo()).of_file(file, 2, 5, random.Random(0))


def test_conversations(tmp_path: Path) -> None:
    question, answer = "What is the capital of France?", "The capital of France is Paris."
    talks = [
        [question, answer, "And of Spain?"],
        [question],  # nobody answered
        ["Hi", answer],  # too short
        [question, "No"],  # too short an answer
        [question * 1000, answer],  # too long
    ]
    rows = [
        {"id": "x", "conversations": [{"from": "human", "value": turn} for turn in turns]} for turns in talks
    ]
    file = tmp_path / "talks.json"
    file.write_text(json.dumps(rows))
    tokenizer = demo()
    maker, num_input = make(tokenizer), len(tokenizer.encode(question))
    expected = Question(question, num_input, len(tokenizer.encode(answer, add_special_tokens=False)))
    assert asyncio.run(maker.of_sharegpt(file, 3, None, random.Random(0))) == [expected] * 3
    found = asyncio.run(maker.of_sharegpt(file, 2, 50, random.Random(0)))
    assert found == [Question(question, num_input, 50)] * 2
    file.write_text("{}")
    with pytest.raises(ConfigError, match="Expected `array`"):
        asyncio.run(maker.of_sharegpt(file, 3, None, random.Random(0)))
