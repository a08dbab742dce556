"""Items of the Responses API to messages and tools of the internal form, and an answer's events to items."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from quire.server.conversation import no_media, no_such_tool, unread
from quire.server.errors import bad_request
from quire.text.messages import refuse
from quire.text.tools.events import ArgumentsDelta, CallBegins, CallEnds, Event, ReasoningDelta, TextDelta

ROLES = ("user", "assistant", "system", "developer")
TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text", "refusal")
NO_MEDIA = ("input_image", "input_file", "input_audio")
Item = dict[str, Any]


def items_of(given: str | list[Item], suffix: str) -> list[Item]:
    """The input of a request as items, each with a type and an id."""
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    found = []
    for number, item in enumerate(items):
        kind, own_id = item.get("type") or "message", item.get("id") or f"in_{suffix}_{number}"
        item = {**item, "type": kind, "id": own_id}
        if kind == "message" and isinstance(item.get("content"), str):
            part = "output_text" if item.get("role") == "assistant" else "input_text"
            item["content"] = [{"type": part, "text": item["content"]}]
        found.append(item)
    return found


def conversation(
    items: Sequence[Item], instructions: str | None, warnings: list[str], *, num_old: int = 0
) -> list[Item]:
    """The messages of a request. What the assistant thought, wrote and called in turn is one message.

    Args:
        items: as `items_of` makes them.
        num_old: the first of them are not the request's own.

    Raises:
        ApiError, InvalidRequest: names what is wrong, or cannot be read yet.
    """
    found: list[Item] = [{"role": "system", "content": instructions}] if instructions else []
    names: dict[str, str] = {}
    for index, item in enumerate(items, -num_old):
        where, kind = f"input[{index}]", item["type"]
        if kind == "message":
            role = item.get("role")
            if role not in ROLES:
                raise refuse(f"{where}.role", item.get("role"), f"one of {', '.join(ROLES)}")
            text = _text(item.get("content"), f"{where}.content")
            last = _assistant(found) if role == "assistant" else None
            if last is not None:
                last["content"] = f"{last['content']}\n{text}" if last["content"] else text
            else:
                found.append({"role": role, "content": text})
        elif kind == "reasoning":
            last = _assistant(found, new=True)
            thought = _text(item.get("content") or item.get("summary") or "", f"{where}.content")
            last["reasoning_content"] = last.get("reasoning_content", "") + thought
        elif kind in ("function_call", "custom_tool_call"):
            name, given_id = _string(item, "name", where), _string(item, "call_id", where)
            names[given_id] = name
            if kind == "custom_tool_call":
                item = {**item, "arguments": json.dumps({"input": _string(item, "input", where)})}
            function = {"name": name, "arguments": _string(item, "arguments", where)}
            call = {"id": given_id, "type": "function", "function": function}
            _assistant(found, new=True).setdefault("tool_calls", []).append(call)
        elif kind in ("function_call_output", "custom_tool_call_output"):
            call_id = _string(item, "call_id", where)
            text = _text(item.get("output"), f"{where}.output", warnings)
            known = {"name": names[call_id]} if call_id in names else {}
            found.append({"role": "tool", "tool_call_id": call_id, **known, "content": text})
        elif kind == "item_reference":
            raise bad_request(f"{where} refers to an item; send the item itself", "input")
        elif index >= 0:
            warnings.append(
                f"{where} is of type {str(kind)[:100]!r}, which the model cannot read; it was left out"
            )
    return found


def functions(tools: Iterable[Item], warnings: list[str]) -> list[Item]:
    """Tools in Chat Completions' format; those that are no functions are left out with a warning."""
    found = []
    for tool in tools:
        if tool.get("type") != "function":
            warnings.append(no_such_tool(tool.get("type")))
        else:
            kept = {
                name: tool[name]
                for name in ("name", "description", "parameters")
                if tool.get(name) is not None
            }
            found.append({"type": "function", "function": kept})
    return found


def _assistant(found: list[Item], *, new: bool = False) -> Any:
    """The message of the assistant's that is last; without one a new one, or None."""
    if found and found[-1]["role"] == "assistant":
        return found[-1]
    if new:
        found.append({"role": "assistant", "content": ""})
    return found[-1] if new else None


def _text(content: object, where: str, notes: list[str] | None = None) -> str:
    """With `notes`, warnings, the model is told of what it cannot read, instead of refusing all of the conversation."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise refuse(where, content, "a string or a list of parts")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in NO_MEDIA and notes is not None:
            part, kind = {"text": unread(f"{where}[{index}]", kind, notes)}, "text"
        elif kind in NO_MEDIA:
            raise no_media(f"{where}[{index}]", kind)
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind not in TEXTS or not isinstance(text, str):
            raise refuse(f"{where}[{index}]", part, 'a part such as {"type": "input_text", "text": "..."}')
        texts.append(text)
    return "\n".join(texts)


def _string(item: Item, name: str, where: str) -> str:
    if not isinstance(item.get(name), str):
        raise refuse(f"{where}.{name}", item.get(name), "a string")
    return str(item[name])


class Items:
    """The items of one answer, in the order in which the model writes them.

    Attributes:
        output: those that have ended, as an answer in one piece has them.
    """

    def __init__(self, suffix: str):
        """`suffix` is part of the items' ids."""
        self.suffix = suffix
        self.output: list[Item] = []
        self._item: Item | None = None  # the open one
        self._pieces: list[str] = []

    def take(self, events: Iterable[Event]) -> list[Item]:
        """Events of the stream for what is new."""
        told: list[Item] = []
        for event in events:
            match event:
                case TextDelta(text):
                    told += self._more("message", {"role": "assistant", "content": []}, text)
                case ReasoningDelta(text):
                    told += self._more("reasoning", {"summary": [], "content": []}, text)
                case CallBegins(_, call_id, name):
                    told += self._begin("function_call", {"call_id": call_id, "name": name, "arguments": ""})
                case ArgumentsDelta(_, text):
                    told.append(self._delta("response.function_call_arguments.delta", text))
                case CallEnds():
                    told += self.end("completed")
        return told

    def end(self, status: str) -> list[Item]:
        """The open item ends, if there is one."""
        item, text = self._item, "".join(self._pieces)
        if item is None:
            return []
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
            told = [{"type": "response.function_call_arguments.done", **self._place(), "arguments": text}]
        else:
            name, part = _part(item["type"], text)
            item["content"] = [part]
            told = [
                {"type": f"response.{name}.done", **self._place(0), "text": text, **_logprobs(name)},
                {"type": "response.content_part.done", **self._place(0), "part": part},
            ]
        told.append({"type": "response.output_item.done", "output_index": len(self.output), "item": item})
        self.output.append(item)
        self._item = None
        return told

    def _more(self, kind: str, fields: Item, text: str) -> list[Item]:
        told = []
        name, part = _part(kind, "")
        if self._item is None or self._item["type"] != kind:
            told = self._begin(kind, fields)
            told.append({"type": "response.content_part.added", **self._place(0), "part": part})
        return [*told, {**self._delta(f"response.{name}.delta", text, 0), **_logprobs(name)}]

    def _begin(self, kind: str, fields: Item) -> list[Item]:
        told = self.end("completed")
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
        given = f"{prefix}_{self.suffix}_{len(self.output)}"
        self._item, self._pieces = {"id": given, "type": kind, "status": "in_progress", **fields}, []
        added = {"output_index": len(self.output), "item": dict(self._item)}
        return [*told, {"type": "response.output_item.added", **added}]

    def _delta(self, kind: str, text: str, part: int | None = None) -> Item:
        self._pieces.append(text)
        return {"type": kind, **self._place(part), "delta": text}

    def _place(self, part: int | None = None) -> Item:
        place = {"item_id": "" if self._item is None else self._item["id"], "output_index": len(self.output)}
        return place if part is None else {**place, "content_index": part}


def _part(kind: str, text: str) -> tuple[str, Item]:
    """A part of an item's content, and its name in types of events."""
    if kind == "reasoning":
        return "reasoning_text", {"type": "reasoning_text", "text": text}
    return "output_text", {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _logprobs(name: str) -> Item:
    return {"logprobs": []} if name == "output_text" else {}
