"""Anthropic's blocks to messages and tools of the internal form, and an answer's events to blocks."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from quire.errors import InvalidRequest
from quire.server.conversation import no_media, no_such_tool, unread
from quire.text.messages import refuse
from quire.text.tools.events import ArgumentsDelta, CallBegins, CallEnds, Event, ReasoningDelta, TextDelta

NO_MEDIA = ("image", "document", "audio", "video")
# What other servers' answers have, and a model cannot read: left out, with a warning.
FOREIGN = ("redacted_thinking", "server_tool_use", "tool_reference", "container_upload")
ROLES = ("user", "assistant", "system")
Block = dict[str, Any]


def conversation(
    messages: list[Block], system: str | list[Block] | None, warnings: list[str]
) -> list[dict[str, Any]]:
    """The messages of a request.

    Raises:
        ApiError, InvalidRequest: names what is wrong, or cannot be read yet.
    """
    found: list[dict[str, Any]] = []
    if system:
        found.append({"role": "system", "content": _text_parts(system, "system", warnings)})
    names: dict[str, str] = {}  # of tools, by the ids of calls
    for index, message in enumerate(messages):
        where, role, content = f"messages[{index}]", message.get("role"), message.get("content")
        if role not in ROLES:
            raise refuse(f"{where}.role", role, f"one of {', '.join(ROLES)}")
        if isinstance(content, str):
            found.append({"role": role, "content": content})
        elif not isinstance(content, list):
            raise refuse(f"{where}.content", content, "a string or a list of blocks")
        elif role == "assistant":
            found.append(_said(content, f"{where}.content", names, warnings))
        else:
            found += _heard(str(role), content, f"{where}.content", names, warnings)
    return found


def functions(tools: Iterable[Block], warnings: list[str]) -> list[dict[str, Any]]:
    """Tools in Chat Completions' format; those that are no functions are left out with a warning."""
    found = []
    for index, tool in enumerate(tools):
        if tool.get("type") not in (None, "custom"):
            warnings.append(no_such_tool(tool["type"]))
            continue
        if not isinstance(tool.get("input_schema"), dict):
            raise refuse(f"tools[{index}].input_schema", tool.get("input_schema"), "an object, a JSON schema")
        warnings += [
            f"{name!r} of a tool has no effect" for name in ("strict", "defer_loading") if tool.get(name)
        ]
        function = {"name": tool.get("name"), "parameters": tool["input_schema"]}
        if tool.get("description"):
            function["description"] = tool["description"]
        found.append({"type": "function", "function": function})
    return found


def _said(content: list[Any], where: str, names: dict[str, str], warnings: list[str]) -> dict[str, Any]:
    """A message of the assistant's: what it thought, wrote and called."""
    texts, thoughts, calls = [], [], []
    for index, block in enumerate(content):
        kind, here = _kind(block, f"{where}[{index}]"), f"{where}[{index}]"
        if kind == "text":
            texts.append(_string(block, "text", here))
        elif kind == "thinking":
            thoughts.append(_string(block, "thinking", here))
        elif kind == "tool_use":
            name, given = _string(block, "name", here), _string(block, "id", here)
            if not isinstance(block.get("input"), dict):
                raise refuse(f"{here}.input", block.get("input"), "an object")
            names[given] = name
            calls.append(
                {"id": given, "type": "function", "function": {"name": name, "arguments": block["input"]}}
            )
        else:
            _leave_out(kind, here, warnings)
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _heard(
    role: str, content: list[Any], where: str, names: Mapping[str, str], warnings: list[str]
) -> list[dict[str, Any]]:
    """Messages of the user's: results of tools are messages of their own."""
    found: list[dict[str, Any]] = []
    for index, block in enumerate(content):
        kind, here = _kind(block, f"{where}[{index}]"), f"{where}[{index}]"
        if kind == "tool_result":
            given = _string(block, "tool_use_id", here)
            parts = _text_parts(block.get("content") or "", f"{here}.content", warnings, notes=True)
            text = "\n".join(part["text"] for part in parts)
            if block.get("is_error") is True:  # templates have no word for it
                text = f"Error: {text}"
            name = {"name": names[given]} if given in names else {}
            found.append({"role": "tool", "tool_call_id": given, **name, "content": text})
        elif kind == "text":
            part = {"type": "text", "text": _string(block, "text", here)}
            if found and found[-1]["role"] == role:
                found[-1]["content"].append(part)
            else:
                found.append({"role": role, "content": [part]})
        else:
            _leave_out(kind, here, warnings)
    return found or [{"role": role, "content": ""}]


def _text_parts(
    content: object, where: str, warnings: list[str], *, notes: bool = False
) -> list[dict[str, str]]:
    """`notes`: the model is told of what it cannot read."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise refuse(where, content, "a string or a list of blocks")
    parts = []
    for index, block in enumerate(content):
        here = f"{where}[{index}]"
        if (kind := _kind(block, here)) == "text":
            parts.append({"type": "text", "text": _string(block, "text", here)})
        elif notes and kind in NO_MEDIA:
            parts.append({"type": "text", "text": unread(here, kind, warnings)})
        else:
            _leave_out(kind, here, warnings)
    return parts


def _kind(block: object, where: str) -> str:
    kind = block.get("type") if isinstance(block, dict) else None
    if not isinstance(kind, str):
        raise refuse(where, block, 'a block such as {"type": "text", "text": "..."}')
    return kind


def _string(block: Block, name: str, where: str) -> str:
    if not isinstance(block.get(name), str):
        raise refuse(f"{where}.{name}", block.get(name), "a string")
    return str(block[name])


def _leave_out(kind: str, where: str, warnings: list[str]) -> None:
    if kind in NO_MEDIA:
        raise no_media(where, kind)
    if kind not in FOREIGN and not kind.endswith("_tool_result"):
        known = "text, thinking, tool_use and tool_result, each where it belongs"
        raise InvalidRequest(
            f"{where} is a block of type {kind[:100]!r}; known are {known}", param="messages"
        )
    warnings.append(
        f"{where} is a block of type {kind[:100]!r}, which the model cannot read; it was left out"
    )


class Blocks:
    """The blocks of one answer, in the order in which the model writes them.

    Attributes:
        content: those that have ended, as an answer in one piece has them.
    """

    def __init__(self, *, shows_thinking: bool):
        self.shows_thinking = shows_thinking
        self.content: list[Block] = []
        self._block: Block | None = None  # the open one
        self._pieces: list[str] = []

    def take(self, events: Iterable[Event]) -> list[dict[str, Any]]:
        """Events of the stream for what is new."""
        told: list[dict[str, Any]] = []
        for event in events:
            match event:
                case TextDelta(text):
                    told += self._more({"type": "text", "text": ""}, "text", text)
                case ReasoningDelta(text) if self.shows_thinking:
                    told += self._more(
                        {"type": "thinking", "thinking": "", "signature": ""}, "thinking", text
                    )
                case CallBegins(_, given, name):
                    told += self._begin({"type": "tool_use", "id": given, "name": name, "input": {}})
                case ArgumentsDelta(_, text):
                    told.append(self._delta({"type": "input_json_delta", "partial_json": text}, text))
                case CallEnds():
                    told += self.end()
        return told

    def end(self) -> list[dict[str, Any]]:
        """The open block ends, if there is one."""
        block, text = self._block, "".join(self._pieces)
        if block is None:
            return []
        told = []
        if block["type"] == "tool_use":
            block["input"] = _input(text)
        else:
            block[block["type"]] = text
        if block["type"] == "thinking":
            block["signature"] = hashlib.blake2b(text.encode(), digest_size=24).hexdigest()
            told.append(self._delta({"type": "signature_delta", "signature": block["signature"]}))
        told.append({"type": "content_block_stop", "index": len(self.content)})
        self.content.append(block)
        self._block = None
        return told

    def _more(self, block: Block, name: str, text: str) -> list[dict[str, Any]]:
        told = [] if self._block is not None and self._block["type"] == name else self._begin(block)
        return [*told, self._delta({"type": f"{name}_delta", name: text}, text)]

    def _begin(self, block: Block) -> list[dict[str, Any]]:
        told = self.end()
        self._block, self._pieces = block, []
        start = {"type": "content_block_start", "index": len(self.content), "content_block": dict(block)}
        return [*told, start]

    def _delta(self, delta: dict[str, str], text: str = "") -> dict[str, Any]:
        self._pieces.append(text)
        return {"type": "content_block_delta", "index": len(self.content), "delta": delta}


def _input(text: str) -> dict[str, Any]:
    """A call's arguments as an object; what is none is shown as Anthropic's clients send it back."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"INVALID_JSON": text}
