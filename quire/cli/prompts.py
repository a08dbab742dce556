"""Prompts for a served model: random words of an exact number of tokens, or those of a file.

Knows no load and no answers. Tokens are counted by the server, or by a tokenizer on this machine.
"""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from quire.cli.calls import Question
from quire.cli.client import Client
from quire.cli.workload import Shape
from quire.errors import ConfigError, RequestFailed
from quire.text.tokenizer import Tokenizer

ROUNDS = 32
AT_ONCE = 16  # questions to the server's tokenizer
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
SHAREGPT_MIN_LEN, SHAREGPT_MAX_INPUT, SHAREGPT_MAX_TOTAL = 4, 1024, 2048  # as vLLM prunes it

T = TypeVar("T")


class Row(msgspec.Struct):
    """A line of a file of prompts."""

    prompt: str
    output_tokens: int | None = None


class Turn(msgspec.Struct):
    value: str


class Conversation(msgspec.Struct):
    """An entry of ShareGPT's files."""

    conversations: list[Turn] = []


class Tokens(Protocol):
    """A tokenizer, here or elsewhere."""

    async def encode(self, text: str, *, special: bool) -> list[int]: ...

    async def decode(self, ids: Sequence[int]) -> str: ...


class ServerTokens:
    """The server's own, by `/tokenize` and `/detokenize`."""

    def __init__(self, client: Client, model: str):
        self._client, self._model = client, model
        self._gate = asyncio.Semaphore(AT_ONCE)

    async def encode(self, text: str, *, special: bool) -> list[int]:
        body = {"model": self._model, "prompt": text, "add_special_tokens": special}
        return list(await self._ask("/tokenize", body, "tokens"))

    async def decode(self, ids: Sequence[int]) -> str:
        return str(await self._ask("/detokenize", {"model": self._model, "tokens": ids}, "prompt"))

    async def _ask(self, path: str, body: object, name: str) -> Any:
        async with self._gate:
            try:
                answer = await self._client.json(path, body)
            except RequestFailed as error:
                raise RequestFailed(f"{error}; prompts can be made without it: pass --tokenizer") from None
        if not isinstance(answer, dict) or name not in answer:
            raise RequestFailed(f"{path} of the server answers without {name!r}; pass --tokenizer")
        return answer[name]


class LocalTokens:
    """A checkpoint's, on this machine."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    async def encode(self, text: str, *, special: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=special)

    async def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


@dataclass(frozen=True)
class Maker:
    """Makes prompts. `special`: whether the server will put special tokens before them, which count."""

    tokens: Tokens
    special: bool

    async def fresh(self, shape: Shape, prefix_len: int, chance: random.Random) -> list[Question]:
        """Prompts of the shape's lengths after `prefix_len` tokens that all have in common."""
        inputs, outputs = shape.lengths(chance)
        prefix = await self.text(prefix_len, chance) if prefix_len else ""
        lengths = [prefix_len + length for length in inputs]
        return await self._questions([prefix] * shape.num_prompts, lengths, outputs, chance)

    async def sharing(
        self, shape: Shape, prefix_len: int, num_prefixes: int, chance: random.Random
    ) -> list[Question]:
        """As many prompts for each of the prefixes, shuffled; what is left of a division is not asked.

        Raises:
            ConfigError: there are fewer prompts than prefixes.
        """
        each = shape.num_prompts // max(1, num_prefixes)
        if num_prefixes < 1 or not each:
            raise ConfigError(
                f"prefix_repetition_num_prefixes is {num_prefixes};"
                f" it must be from 1 to num_prompts ({shape.num_prompts})"
            )
        prefixes = [await self.text(prefix_len, chance) for _ in range(num_prefixes)] * each
        count = len(prefixes)
        lengths = [prefix_len + shape.input_len] * count
        questions = await self._questions(prefixes, lengths, [shape.output_len] * count, chance)
        chance.shuffle(questions)
        return questions

    async def _questions(
        self, prefixes: Sequence[str], inputs: Sequence[int], outputs: Sequence[int], chance: random.Random
    ) -> list[Question]:
        # A source of chance for each, so that what is drawn does not depend on which answer comes first.
        chances = [random.Random(chance.getrandbits(64)) for _ in prefixes]
        texts = await asyncio.gather(
            *(
                self.text(length, own, begin=prefix)
                for prefix, length, own in zip(prefixes, inputs, chances, strict=True)
            )
        )
        return [Question(*question) for question in zip(texts, inputs, outputs, strict=True)]

    async def text(self, num_tokens: int, chance: random.Random, begin: str = "") -> str:
        """`begin`, and random words until there are exactly `num_tokens` tokens.

        Cutting tokens and adding words is repeated until it fits: the text of cut tokens may have more or fewer
        tokens than were left, where the tokenizer then joins letters in another way.

        Raises:
            ConfigError: it never fits.
        """
        text, count = _more(begin, num_tokens, chance), 0
        for _ in range(ROUNDS):
            count = len(await self.tokens.encode(text, special=self.special))
            if count == num_tokens:
                return text
            if count < num_tokens:
                text = _more(text, num_tokens - count, chance)
                continue
            ids = await self.tokens.encode(text, special=False)
            room = num_tokens - (count - len(ids))
            if room < 1:
                raise ConfigError(
                    f"a prompt of {num_tokens} tokens has no room for text: this tokenizer puts"
                    f" {count - len(ids)} special ones before it; ask for more"
                )
            text = await self.tokens.decode(ids[:room])
        raise ConfigError(
            f"no prompt of exactly {num_tokens} tokens could be made for this tokenizer (the last had {count});"
            " ask for another length"
        )

    def of_file(self, path: Path, num_prompts: int, output_len: int, chance: random.Random) -> list[Question]:
        """Prompts of a file with a JSON object in each line: `prompt`, and `output_tokens` where `output_len` is
        -1. The server counts their tokens. In random order, and again if there are too few.
        """
        questions: list[Question] = []
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if not line.strip():
                continue
            row = _decoded(line, Row, f"{path}, line {number}")
            length = row.output_tokens if output_len == -1 else output_len
            if not row.prompt or length is None or length < 1:
                raise ConfigError(
                    f"{path}, line {number}: prompt must not be empty, and the output at least 1 token, by"
                    f" output_tokens or --custom-output-len; they are {row.prompt[:20]!r} and {length}"
                )
            questions.append(Question(row.prompt, 0, length))
        chance.shuffle(questions)
        return _filled(path, questions[:num_prompts], num_prompts, chance)

    async def of_sharegpt(
        self, path: Path, num_prompts: int, output_len: int | None, chance: random.Random
    ) -> list[Question]:
        """First questions of conversations, with the length of their answers unless `output_len` is given.
        Very short and long ones are left out, as vLLM does.
        """
        found = _decoded(path.read_bytes(), list[Conversation], str(path))
        pairs = [row.conversations[:2] for row in found if len(row.conversations) > 1]
        chance.shuffle(pairs)
        questions: list[Question] = []
        for first, second in pairs:
            num_input = len(await self.tokens.encode(first.value, special=self.special))
            num_output = output_len or len(await self.tokens.encode(second.value, special=False))
            shortest = num_input if output_len else min(num_input, num_output)
            if (
                shortest >= SHAREGPT_MIN_LEN
                and num_input <= SHAREGPT_MAX_INPUT
                and num_input + num_output <= SHAREGPT_MAX_TOTAL
            ):
                questions.append(Question(first.value, num_input, num_output))
            if len(questions) == num_prompts:
                break
        return _filled(path, questions, num_prompts, chance)


def _filled(path: Path, questions: list[Question], num_prompts: int, chance: random.Random) -> list[Question]:
    if not questions:
        raise ConfigError(f"{path} has no prompts that can be used")
    return questions + chance.choices(questions, k=num_prompts - len(questions))


def _more(text: str, num_words: int, chance: random.Random) -> str:
    """A word has at least one token, and begins with a space, where tokens do not go across."""
    words = (
        "".join(chance.choice(CONSONANTS) + chance.choice(VOWELS) for _ in range(1 + (chance.random() < 0.5)))
        for _ in range(num_words)
    )
    return " ".join([text, *words] if text else words)


def _decoded(data: bytes, kind: type[T], where: str) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError as error:  # not JSON, or not of this form
        raise ConfigError(f"{where}: {error}") from None
