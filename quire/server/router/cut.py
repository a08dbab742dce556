"""Cuts a stream into pieces whose tokens are known, and keeps what is needed to go on elsewhere. Knows no socket."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from quire.server.resume import COMMENT, Told

MARK = b"\n" + COMMENT
END = b"\n\n"
ERROR = re.compile(rb'(?:event: error\n)?data: (\{(?:"type":"error",)?"error":.*)')
SEND_AGAIN = 503  # what a server says in a stream that it ends before its time


class _Refusal(msgspec.Struct):
    code: int | str | None = None


class _Failure(msgspec.Struct):
    error: _Refusal


@dataclass(slots=True)
class Choice:
    """What a client has of one."""

    tokens: list[int] = field(default_factory=list)
    ended: bool = False


class Cut:
    """One stream, through all the servers that write it. What the client is given is whole pieces.

    Attributes:
        choices: what the client has.
        prompts: what was found of their prompts in the cache.
        done: the last piece has come; it is kept until the stream ends, so that something is left to ask for.
    """

    def __init__(self) -> None:
        self.choices: dict[int, Choice] = {}
        self.prompts: dict[int, dict[str, Any]] = {}
        self.done = False
        self._buffer = bytearray()
        self._last = b""

    def feed(self, data: bytes) -> bytes:
        """What can be given to the client now."""
        self._buffer += data
        whole = b""
        while (at := self._buffer.find(MARK)) >= 0:
            begin = at + len(MARK)
            end = self._buffer.find(END, begin)
            if end < 0:
                break
            piece, told = bytes(self._buffer[: at + 1]), Told.read(bytes(self._buffer[begin:end]))
            del self._buffer[: end + len(END)]
            if told.done:
                self.done, self._last = True, piece
                break
            whole += piece
            for index, tokens, ended in told.choices:
                choice = self.choices.setdefault(index, Choice())
                choice.tokens += tokens
                choice.ended |= ended
            for index, cached, missed in told.prompts:
                self.prompts[index] = {"index": index, "cached_tokens": cached, "missed_tokens": missed}
        return whole

    def rest(self) -> bytes:
        """What is left when the stream has ended well."""
        return self._last + bytes(self._buffer)

    def broken(self) -> None:
        """What is not whole is computed again."""
        self._buffer.clear()
        self._last, self.done = b"", False

    @property
    def given_up(self) -> bool:
        """The server ended the stream before its time, and says that it should be sent again."""
        found = ERROR.match(self._buffer)
        if self.done or found is None:
            return False
        try:
            return msgspec.json.decode(found[1], type=_Failure).error.code == SEND_AGAIN
        except msgspec.MsgspecError:
            return False

    def body(self, fields: Mapping[str, Any], created: int) -> bytes:
        """The request for what is missing."""
        choices = [
            {"index": index, "token_ids": choice.tokens, "ended": choice.ended}
            for index, choice in self.choices.items()
        ]
        resume = {"created": created, "choices": choices, "prompts": list(self.prompts.values())}
        return msgspec.json.encode({**fields, "resume": resume})
