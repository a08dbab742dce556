"""Text to token ids and back, by the `tokenizers` library, with transformers' ids. Knows no model."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from quire.errors import InvalidRequest, ModelError
from quire.text.classes import DEFAULT_TOKENS, adjust, state, tokenizer_class
from quire.text.files import chat_templates, extra_tokens, named_tokens, read_json, token_text

NO_LIMIT = 1 << 40  # lengths above it, such as transformers' 10**30, mean none
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
NEIGHBOURLY = ('"BPEDecoder"', '"CTC"')  # decoders that write a token differently before another one


class Tokenizer:
    """A checkpoint's tokenizer.

    Attributes:
        vocab_size: one more than the highest token id.
        special_tokens: name -> text, `bos_token`, `eos_token` and so on, as chat templates see them.
        special_ids: tokens that `skip_special_tokens` leaves out.
        chat_templates: name -> Jinja source; "default" is the one without a name.
        max_length: most tokens that the model was made for, where the tokenizer says so.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        special_tokens: Mapping[str, str] | None = None,
        templates: Mapping[str, str] | None = None,
        max_length: int | None = None,
    ):
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._decoder = state(backend.decoder)
        self._pieces: dict[int, bytes] = {}
        vocab = backend.get_vocab(with_added_tokens=True)
        self._longest_token = max(map(len, vocab), default=1)
        self.vocab_size = max(vocab.values(), default=-1) + 1  # ids may have gaps
        self.special_tokens = dict(special_tokens or {})
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self.chat_templates = dict(templates or {})
        self.max_length = max_length

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat templates.

        Without tokenizer.json, transformers converts what there is (SentencePiece, tiktoken, vocab.json).

        Raises:
            ModelError: the folder has no tokenizer that can be read; the message says what to do.
        """
        config = read_json(folder / "tokenizer_config.json")
        model_config = read_json(folder / "config.json")
        if "added_tokens_decoder" not in config:  # the older place
            config |= read_json(folder / "special_tokens_map.json")
        path = folder / "tokenizer.json"
        if path.is_file():
            backend, named = _from_json(path, config, model_config)
        else:
            backend, named = _converted(folder)
        length = config.get("model_max_length")
        return cls(
            backend,
            special_tokens=named,
            templates=chat_templates(folder, config),
            max_length=int(length) if isinstance(length, int | float) and 0 < length < NO_LIMIT else None,
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; `add_special_tokens` adds what the model expects around a text, such as BOS.

        Raises:
            InvalidRequest: the text cannot be written as UTF-8.
        """
        return self.encode_batch((text,), add_special_tokens=add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` for many texts, which the library spreads over the processor's cores."""
        try:
            found = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise _why_not(texts) or error from error
        return [encoding.ids for encoding in found]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Spaces are not cleaned up, so that a stream gives the same text.

        Raises:
            InvalidRequest: an id is not a number from 0 to 2**32 - 1.
        """
        try:
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError) as error:
            wrong = next((i for i in ids if not isinstance(i, int) or not 0 <= i < 1 << 32), ids)
            raise InvalidRequest(
                f"token id is {wrong!r}; it must be from 0 to {self.vocab_size - 1}"
            ) from error

    def token(self, index: int) -> str:
        """The token as the vocabulary writes it, "Ġhello" for example; "" for an id that has none."""
        return (self._backend.id_to_token(index) if 0 <= index < self.vocab_size else None) or ""

    def token_id(self, text: str) -> int | None:
        """The id of a token as the vocabulary writes it."""
        return self._backend.token_to_id(text)

    def token_bytes(self, index: int) -> bytes:
        """What the token adds to a text that has begun: bytes, because a character may span several tokens.

        Raises:
            ModelError: what a token adds depends on its neighbours.
        """
        piece = self._pieces.get(index)
        if piece is None:
            piece = self._piece(index)
            if 0 <= index < self.vocab_size:
                self._pieces[index] = piece
        return piece

    def token_text(self, index: int) -> str:
        """`token_bytes` as text; bytes that are no characters by themselves are U+FFFD."""
        return self.token_bytes(index).decode("utf-8", "replace")

    def first_bytes(self, index: int) -> bytes:
        """Like `token_bytes` for a token that begins a text, whose leading space many decoders drop."""
        piece = self.token_bytes(index)
        if '"ByteLevel"' in self._decoder or self._byte(index) or not piece:
            return piece
        return self._backend.decode([index], skip_special_tokens=False).encode("utf-8")

    def _piece(self, index: int) -> bytes:
        if '"ByteLevel"' in self._decoder:
            return _bytes_of(self.token(index))
        if byte := self._byte(index):
            return byte
        if any(kind in self._decoder for kind in NEIGHBOURLY):
            raise ModelError(
                "this tokenizer's decoder needs the next token to write one, so its text cannot stream"
            )
        before = self.decode([self._anchor], skip_special_tokens=False)
        return self.decode([self._anchor, index], skip_special_tokens=False)[len(before) :].encode("utf-8")

    def _byte(self, index: int) -> bytes:
        """The byte that a byte-fallback token stands for (SentencePiece); empty for others."""
        found = BYTE_TOKEN.fullmatch(self.token(index)) if '"ByteFallback"' in self._decoder else None
        return bytes.fromhex(found[1]) if found else b""

    @cached_property
    def _anchor(self) -> int:
        """A token whose text stands by itself: what follows it shows what other tokens add."""
        for index in range(self.vocab_size):
            if index not in self.special_ids and self.token(index).isalnum():
                return index
        return 0

    def max_chars(self, max_tokens: int) -> int:
        """No ordinary text of more characters fits into `max_tokens` tokens: to refuse it before encoding.

        Tokenizers that drop white space or fuse unknown characters could fit more.
        """
        return max_tokens * self._longest_token

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @property
    def pad_token(self) -> str | None:
        return self.special_tokens.get("pad_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._named_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._named_id("pad_token")

    def _named_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.token_id(text)

    def to_json(self) -> str:
        """The tokenizer as tokenizer.json writes it, for libraries that build their own, such as grammars."""
        return self._backend.to_str()


def _why_not(texts: Sequence[str]) -> InvalidRequest | None:
    """JSON can hold half a surrogate pair, which is no character."""
    for text in texts:
        if not isinstance(text, str):
            return InvalidRequest(f"a text is a {type(text).__name__}; it must be a string", param="prompt")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            found = text[error.start]
            return InvalidRequest(
                f"character {error.start} of the text is the lone surrogate {found!r}; send whole characters",
                param="prompt",
            )
    return None


def _from_json(
    path: Path, config: Mapping[str, Any], model_config: Mapping[str, Any]
) -> tuple[Backend, dict[str, str]]:
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"{path} cannot be read: {error}; download it again") from error
    name = tokenizer_class(config, model_config)
    adjust(backend, name, config, str(model_config.get("model_type", "")))
    defaults = DEFAULT_TOKENS.get(name, {})
    known = {key: text for key, text in defaults.items() if backend.token_to_id(text) is not None}
    absent = {key: text for key, text in known.items() if key not in config}
    named = absent | named_tokens(config)
    _add_tokens(backend, config, named)
    return backend, named


def _add_tokens(backend: Backend, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Tokens of the settings that tokenizer.json lacks get the next ids, in transformers' order."""
    rules = config.get("added_tokens_decoder") or {}
    try:
        listed = [AddedToken(**rules[key]) for key in sorted(rules, key=int)]
        named_ones = [_added(config.get(name), text, special=True) for name, text in named.items()]
        extra = [_added(value, token_text(value) or "") for value in extra_tokens(config)]
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"the added tokens of tokenizer_config.json are malformed: {error}") from error
    there = {token.content for token in backend.get_added_tokens_decoder().values()}
    there |= {token.content for token in listed}
    new: dict[str, AddedToken] = {}
    for token in (*named_ones, *extra):
        if token.content not in there:
            new.setdefault(token.content, token)
    backend.add_tokens([*listed, *new.values()])
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))


def _added(value: object, text: str, **more: bool) -> AddedToken:
    """A token with its matching rules, where it has some; otherwise it is special."""
    if not isinstance(value, Mapping):
        return AddedToken(text, special=True)
    return AddedToken(**{**{str(k): v for k, v in value.items() if k != "__type"}, **more})


def _converted(folder: Path) -> tuple[Backend, dict[str, str]]:
    """A tokenizer without tokenizer.json, as transformers converts it."""
    advice = (
        f"{folder} has no tokenizer.json. Save one with transformers "
        "(AutoTokenizer.from_pretrained(...).save_pretrained(...)), or name a folder that has one with"
        " --tokenizer"
    )
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # conversion fails in as many ways as there are formats
        raise ModelError(f"{advice}. Converting its files failed: {error}") from error
    if not isinstance(found, PreTrainedTokenizerFast):
        raise ModelError(f"{advice}. Its class, {type(found).__name__}, cannot be converted")
    return Backend.from_str(found.backend_tokenizer.to_str()), dict(found.special_tokens_map)


def _bytes_of(token: str) -> bytes:
    """A byte-level token writes each byte as one printable character (GPT-2); others stay as they are."""
    try:
        return bytes(map(_BYTE_OF_CHARACTER.__getitem__, token))
    except KeyError:
        return token.encode("utf-8")


def _byte_of_character() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHARACTER: Mapping[str, int] = _byte_of_character()


def bad_word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> list[tuple[int, ...]]:
    """Token sequences that write the words, at the start of a text and after a space, as vLLM makes them."""
    found: list[tuple[int, ...]] = []
    for word in words:
        bare_word = word.lstrip() or word
        bare = tuple(tokenizer.encode(bare_word, add_special_tokens=False))
        spaced = tuple(tokenizer.encode(" " + bare_word, add_special_tokens=False))
        if bare:
            found.append(bare)
            if spaced[0] != bare[0] and len(spaced) == len(bare):
                found.append(spaced)
    return list(dict.fromkeys(found))
