"""Checks conversations and tools, and gives them the shape that chat templates read. Knows no Jinja."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire.errors import InvalidRequest

MAX_DEPTH = 64
TEXT_TYPES = ("text", "input_text", "output_text")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing; the first is the standard


@dataclass(frozen=True, kw_only=True)
class ContentFormat:
    """How a template reads `content`.

    Attributes:
        parts: it goes through a list of parts ({"type": "text", "text": ...}), otherwise it wants a string.
        strings: it takes a string too.
        media: types of parts, other than text, that it may get.
    """

    parts: bool = False
    strings: bool = True
    media: frozenset[str] = frozenset()


def refuse(where: str, value: object, rule: str) -> InvalidRequest:
    shown = repr(value)
    shown = shown if len(shown) <= 100 else shown[:100] + "..."
    return InvalidRequest(f"{where} is {shown}; it must be {rule}", param=where.split("[")[0])


def plain(value: object, where: str, depth: int = 0) -> Any:
    """A copy made of JSON's types only, so that a template can reach nothing else.

    Raises:
        InvalidRequest: it holds something else, or is nested too deeply.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth > MAX_DEPTH:
        raise InvalidRequest(f"{where} is nested more than {MAX_DEPTH} deep", param=where.split("[")[0])
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, where, depth + 1) for item in value]
    raise InvalidRequest(
        f"{where} holds a {type(value).__name__}; only JSON's types are allowed", param=where.split("[")[0]
    )


def conversation(messages: Sequence[Mapping[str, Any]], shape: ContentFormat) -> list[dict[str, Any]]:
    """The messages as the template reads them: plain data, without None, tool arguments as objects.

    Raises:
        InvalidRequest: names the message and the field.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise refuse("messages", messages, "a list of messages")
    if not messages:
        raise refuse("messages", list(messages), "a list with at least one message")
    return [_message(message, f"messages[{index}]", shape) for index, message in enumerate(messages)]


def _message(message: object, where: str, shape: ContentFormat) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise refuse(where, message, "an object with the keys role and content")
    found = {key: value for key, value in plain(message, where).items() if value is not None}
    role = found.get("role")
    if not isinstance(role, str) or not role:
        raise refuse(f"{where}.role", role, "a string such as system, user, assistant or tool")
    if "content" in found:
        found["content"] = _content(found["content"], f"{where}.content", shape, joined=role == "tool")
    if "tool_calls" in found:
        found["tool_calls"] = _tool_calls(found["tool_calls"], f"{where}.tool_calls")
        if not found["tool_calls"]:
            del found["tool_calls"]
    reasoning = next((found[name] for name in REASONING if name in found), None)
    if reasoning is not None:  # gpt-oss's template reads `thinking`
        found = {"thinking": reasoning, **found, "reasoning_content": reasoning}
    return found


def _content(
    content: object, where: str, shape: ContentFormat, *, joined: bool
) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content if shape.strings else [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise refuse(where, content, "a string or a list of parts")
    parts = [_part(part, f"{where}[{index}]", shape.media) for index, part in enumerate(content)]
    only_text = all(part["type"] == "text" for part in parts)
    if shape.parts and not (joined and shape.strings and only_text):
        return parts
    if not only_text:
        kinds = sorted({str(part["type"]) for part in parts} - {"text"})
        raise refuse(where, kinds, "text only: this model's chat template takes no other parts")
    return "\n".join(part["text"] for part in parts)


def _part(part: object, where: str, media: Collection[str]) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise refuse(where, part, 'an object such as {"type": "text", "text": "..."}')
    kind = part.get("type")
    if kind in media:
        return part
    if kind == "refusal":
        part, kind = {"text": part.get("refusal")}, "text"
    if kind not in TEXT_TYPES:
        allowed = ", ".join(["text", *sorted(media)])
        raise refuse(f"{where}.type", kind, f"one of {allowed}")
    if not isinstance(part.get("text"), str):
        raise refuse(f"{where}.text", part.get("text"), "a string")
    return {**part, "type": "text"}


def _tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise refuse(where, calls, "a list of tool calls")
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise refuse(f"{where}[{index}].function", function, "an object with the keys name and arguments")
        if not isinstance(function.get("name"), str):
            raise refuse(f"{where}[{index}].function.name", function.get("name"), "a string")
        if "arguments" in function:
            function["arguments"] = _arguments(function["arguments"], f"{where}[{index}].function.arguments")
    return calls


def _arguments(value: object, where: str) -> object:
    """Templates write an object. What a model wrote that is no JSON object stays as the model wrote it."""
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return plain(parsed, where) if isinstance(parsed, dict) else value
    if not isinstance(value, dict):
        raise refuse(where, value, "an object, or a string that holds one as JSON")
    return value


def tool_list(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Tools in OpenAI's format: {"type": "function", "function": {"name": ..., "parameters": {...}}}.

    Raises:
        InvalidRequest: names the tool and the field.
    """
    if tools is None:
        return None
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise refuse("tools", tools, "a list of tools")
    found = []
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if not isinstance(tool, Mapping):
            raise refuse(where, tool, 'an object {"type": "function", "function": {...}}')
        copy = plain(tool, where)
        function = copy.get("function", copy)  # some templates document the bare function
        if not isinstance(function, dict):
            raise refuse(f"{where}.function", function, "an object")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise refuse(f"{where}.function.name", function.get("name"), "a non-empty string")
        parameters = function.get("parameters")
        if parameters is not None and not isinstance(parameters, dict):
            raise refuse(f"{where}.function.parameters", parameters, "an object, a JSON schema")
        found.append(copy)
    return found


def document_list(documents: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Documents for retrieval: objects with the keys title and text.

    Raises:
        InvalidRequest: names the document.
    """
    if documents is None:
        return None
    if isinstance(documents, str | Mapping) or not isinstance(documents, Sequence):
        raise refuse("documents", documents, "a list of documents")
    for index, document in enumerate(documents):
        if not isinstance(document, Mapping):
            raise refuse(f"documents[{index}]", document, "an object with the keys title and text")
    return [plain(document, f"documents[{index}]") for index, document in enumerate(documents)]
