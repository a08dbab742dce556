"""Streams of tokens give the text of all tokens, whole characters only, up to the stop string."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from quire.errors import ModelError
from quire.text.detokenize import Detokenizer, StopStrings
from quire.text.tokenizer import Tokenizer
from tests.tiny_tokenizer import make_tokenizer

QUICK = settings(derandomize=True, deadline=None, max_examples=150)
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@cache
def byte_level() -> Tokenizer:
    with TemporaryDirectory() as folder:
        make_tokenizer(Path(folder), 400)
        return Tokenizer.load(Path(folder))


@cache
def byte_fallback() -> Tokenizer:
    """Like Llama 2: pieces with ▁ for a space, other characters as <0x..> bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁the", "▁a", "a", "b", "c", "the", "▁▁", "é", "▁<"]
    backend = Backend(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend)


@cache
def word_piece() -> Tokenizer:
    words = ["[UNK]", "[CLS]", "a", "##b", "the", "##re", ".", "##.", "don", "'", "t"]
    backend = Backend(models.WordPiece(vocab={w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[UNK]", "[CLS]"])
    return Tokenizer(backend)


def stream(detokenizer: Detokenizer, chunks: Sequence[Sequence[int]]) -> str:
    return "".join(detokenizer.push(chunk) for chunk in chunks) + detokenizer.finish()


def one_by_one(tokens: Sequence[int]) -> list[list[int]]:
    return [[token] for token in tokens]


def split(tokens: list[int], cuts: list[int]) -> list[list[int]]:
    places = sorted({min(cut, len(tokens)) for cut in cuts} | {0, len(tokens)})
    return [tokens[a:b] for a, b in zip(places, places[1:], strict=False)]


BYTE_TOKENS = st.lists(st.integers(0, 399), max_size=40)
CUTS = st.lists(st.integers(0, 40), max_size=6)


@given(BYTE_TOKENS, CUTS, st.booleans())
@QUICK
def test_any_tokens_of_a_byte_level_vocabulary(tokens: list[int], cuts: list[int], skip: bool) -> None:
    tokenizer = byte_level()
    expected = tokenizer.decode(tokens, skip_special_tokens=skip)
    assert stream(Detokenizer(tokenizer, skip_special_tokens=skip), one_by_one(tokens)) == expected
    assert stream(Detokenizer(tokenizer, skip_special_tokens=skip), split(tokens, cuts)) == expected


@given(st.text(max_size=20), st.integers(0, 10))
@QUICK
def test_after_a_prompt_the_text_goes_on(text: str, cut: int) -> None:
    """Also when the prompt ends within a character, which then comes whole."""
    tokenizer = byte_level()
    tokens = tokenizer.encode(text)
    prompt, output = tokens[:cut], tokens[cut:]
    shown = stream(Detokenizer(tokenizer, prompt), one_by_one(output))
    assert REPLACEMENT in text or REPLACEMENT not in shown
    assert text.endswith(shown)
    if not tokenizer.decode(prompt).endswith(REPLACEMENT):
        assert tokenizer.decode(prompt) + shown == text


@given(st.lists(st.integers(0, 268), max_size=20), st.booleans())
@QUICK
def test_byte_fallback(tokens: list[int], with_prompt: bool) -> None:
    """Where bytes are no characters the library replaces their neighbours too; a stream keeps them."""
    tokenizer = byte_fallback()
    prompt = tokenizer.encode("a") if with_prompt else [1]
    before = tokenizer.decode(prompt)
    shown = stream(Detokenizer(tokenizer, prompt), one_by_one(tokens))
    expected = tokenizer.decode([*prompt, *tokens])
    if REPLACEMENT not in expected:
        assert before + shown == expected
    else:
        assert REPLACEMENT in shown


@given(st.lists(st.sampled_from("aé世🙂 the"), max_size=12).map("".join))
@QUICK
def test_byte_fallback_of_text(text: str) -> None:
    tokenizer = byte_fallback()
    tokens = [t for char in text for t in _pieces(tokenizer, char)]
    assert stream(Detokenizer(tokenizer, [4]), one_by_one(tokens)) == text


def _pieces(tokenizer: Tokenizer, char: str) -> list[int]:
    whole = tokenizer.token_id("▁" if char == " " else char)
    return [whole] if whole is not None else [3 + byte for byte in char.encode()]


@given(st.lists(st.integers(0, 10), max_size=10), st.booleans())
@QUICK
def test_word_piece(tokens: list[int], skip: bool) -> None:
    tokenizer = word_piece()
    expected = tokenizer.decode(tokens, skip_special_tokens=skip)
    assert stream(Detokenizer(tokenizer, skip_special_tokens=skip), one_by_one(tokens)) == expected


@given(BYTE_TOKENS)
@QUICK
def test_at_most_three_bytes_wait(tokens: list[int]) -> None:
    """Also in a stream of bytes that never become a character."""
    detokenizer = Detokenizer(byte_level(), skip_special_tokens=False)
    shown = ""
    for count in range(1, len(tokens) + 1):
        shown += detokenizer.push(tokens[count - 1 : count])
        whole = byte_level().decode(tokens[:count], skip_special_tokens=False)
        assert len(whole) - len(shown) <= 3
        assert whole.startswith(shown)


ALPHABET = "ab<x"
LETTERS = st.text(ALPHABET, max_size=30)
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=5), min_size=1, max_size=4)


@cache
def letters() -> Tokenizer:
    """Tokens of one to three characters, so that stop strings begin and end within tokens."""
    words = ["", *ALPHABET, "ab", "<a", "bb<", "xa", "aba"]
    backend = Backend(models.BPE(vocab={w or "<pad>": i for i, w in enumerate(words)}, merges=[]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<pad>"])
    return Tokenizer(backend)


def expected_stop(pieces: list[str], stop: list[str], min_tokens: int) -> tuple[str, str, int] | None:
    """(text before the stop string, stop string, tokens), by looking at the text up to each character."""
    text = "".join(pieces)
    ends = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
    floor = sum(map(len, pieces[:min_tokens]))
    for end in range(floor + 1, len(text) + 1):
        for word in stop:
            if text[:end].endswith(word):
                return text[: end - len(word)], word, next(i + 1 for i, e in enumerate(ends) if e >= end)
    return None


@given(st.lists(st.integers(0, 9), max_size=15), STOPS, st.integers(0, 4), st.booleans(), CUTS)
@settings(QUICK, max_examples=400)
def test_stop_strings(
    tokens: list[int], stop: list[str], min_tokens: int, include: bool, cuts: list[int]
) -> None:
    tokenizer = letters()
    pieces = ["" if t == 0 else tokenizer.token(t) for t in tokens]
    expected = expected_stop(pieces, stop, min_tokens)
    for chunks in (one_by_one(tokens), split(tokens, cuts)):
        detokenizer = Detokenizer(tokenizer, stop=stop, min_tokens=min_tokens, include_stop=include)
        text = stream(detokenizer, chunks)
        if expected is None:
            assert (text, detokenizer.stopped, detokenizer.num_tokens) == ("".join(pieces), None, len(tokens))
        else:
            before, word, count = expected
            assert (text, detokenizer.stopped, detokenizer.num_tokens) == (
                before + word * include,
                word,
                count,
            )


@given(LETTERS, STOPS)
@QUICK
def test_no_more_is_held_than_may_become_a_stop_string(text: str, stop: list[str]) -> None:
    found = StopStrings(stop)
    for end in range(1, len(text) + 1):
        if found.feed(text[end - 1 : end]):
            return
        beginnings = [n for word in stop for n in range(len(word)) if text[:end].endswith(word[:n])]
        assert found.held == max(beginnings)


def test_a_stop_string_is_never_shown() -> None:
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer, stop=("STOP",))
    shown = [detokenizer.push([token]) for token in tokenizer.encode("one STO two STOP three")]
    assert "".join(shown) == "one STO two "
    assert detokenizer.stopped == "STOP"
    assert detokenizer.finish() == ""
    assert detokenizer.push(tokenizer.encode("more")) == ""


def test_a_stop_token_is_no_text_unless_it_is_asked_for() -> None:
    tokenizer = byte_level()
    tokens = tokenizer.encode("hi!")
    for stop in ((), ("zzz",)):
        plain = Detokenizer(tokenizer, stop=stop)
        assert plain.push(tokens, ended_by_token=True) + plain.finish() == tokenizer.decode(tokens[:-1])
        assert plain.num_tokens == len(tokens)
        included = Detokenizer(tokenizer, stop=stop, include_stop=True)
        assert included.push(tokens, ended_by_token=True) + included.finish() == "hi!"


def test_long_stop_strings_cost_no_more_than_short_ones() -> None:
    """Sixteen stop strings of repeats: each character moves the automaton a bounded number of times."""
    found = StopStrings(["a" * 1000 + chr(98 + i) for i in range(16)])
    assert found.feed("a" * 50_000) is None
    assert found.held == 1000
    assert found.feed("q") == ("a" * 1000 + "q", 1)


def test_marks_stand_for_special_tokens() -> None:
    tokenizer = byte_level()
    hello, half = tokenizer.encode("Hi"), tokenizer.encode("é")[:1]
    assert len(tokenizer.encode("é")) == 2
    tokens = [*hello, 1, *half, 1, 2, *hello]
    for skip in (True, False):
        for chunks in ([tokens], one_by_one(tokens)):
            marked = Detokenizer(tokenizer, skip_special_tokens=skip, marks={1: "\udc00"})
            assert stream(marked, chunks) == f"Hi\udc00{REPLACEMENT}\udc00{'' if skip else '<|im_end|>'}Hi"
    stopped = Detokenizer(tokenizer, stop=("iH",), marks={1: "\udc00"})
    assert stream(stopped, one_by_one([*hello, 1, *hello, *hello])) == "Hi\udc00H"


def test_unknown_tokens_are_no_text() -> None:
    assert stream(Detokenizer(byte_level()), [[10_000], [10_001]]) == ""


def test_decoders_that_look_ahead_are_refused() -> None:
    backend = Backend(models.BPE(vocab={"a</w>": 0, "b</w>": 1}, merges=[]))
    backend.decoder = decoders.BPEDecoder()
    with pytest.raises(ModelError, match="cannot stream"):
        Detokenizer(Tokenizer(backend)).push([0])


def test_token_bytes_add_up(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, 300)
    tokenizer = Tokenizer.load(tmp_path)
    text = json.dumps({"city": "Köln 你好 🙂"}, ensure_ascii=False)
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
