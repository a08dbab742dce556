"""A conversation in the one form that every protocol is turned into, up to its requests. Knows no protocol."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from quire.engine.inputs import InputProcessor
from quire.server.asking import CallAsk
from quire.server.call import Call
from quire.server.errors import ApiError, bad_request
from quire.server.frontend import Frontend
from quire.server.reading import Conversation, Reading
from quire.text.messages import refuse
from quire.types import CallRules, Request, SamplingParams, Turn

# What known clients put at the front and change from call to call, so that nothing is found in the cache.
VOLATILE = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n*")
MODES = ("auto", "none", "required")
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
Messages = Sequence[Mapping[str, Any]]


def render(
    front: Frontend,
    messages: Messages,
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    names: Mapping[str, Any],
    kwargs: Mapping[str, Any] | None = None,
    begin: bool = True,
    continues: bool = False,
) -> str:
    """The prompt of a conversation.

    Args:
        messages: as `quire.text.messages` takes them.
        names: the template's, from fields of the request.
        kwargs: those that the request gives by name, which go before.
        begin: it ends with the head of an answer.
        continues: it ends within the last message.

    Raises:
        ApiError, InvalidRequest: the template refuses it, or a name is not the template's to take.
    """
    kwargs = kwargs or {}
    if taken := sorted(set(kwargs) & set(RESERVED)):
        raise bad_request(
            f"chat_template_kwargs has {taken}, which are fields of the request", "chat_template_kwargs"
        )
    if not front.settings.keep_volatile_lines:
        messages = steady(messages)
    return front.service.inputs.chat_prompt(
        messages,
        None,
        tools=tools,
        add_generation_prompt=begin,
        continue_final_message=continues,
        **{**names, **kwargs},
    )


def begin(
    front: Frontend,
    call: Call,
    asked: Conversation,
    ask: CallAsk,
    params: SamplingParams,
    *,
    add_special_tokens: bool = False,
) -> tuple[list[Reading], list[Request]]:
    """The requests of a call that answers a conversation, and what reads each output of it.

    Raises:
        InvalidRequest: the prompt is too long, or a parameter is wrong.
    """
    inputs = front.service.inputs
    requests = call.requests(
        front,
        [asked.prompt],
        params,
        salt=ask.cache_salt,
        add_special_tokens=add_special_tokens,
        resume=ask.resume,
        marks=inputs.dialect.marks,
        turn=Turn(asked.continued, asked.calls),
    )
    return [Reading(inputs, asked, requests[0], f"{call.id} {n}") for n in range(params.n)], requests


def effort_names(effort: str | None) -> dict[str, Any]:
    """Names for the template that say how much to think; nothing leaves it to the template."""
    if effort is None:
        return {}
    return {"reasoning_effort": effort, **thinking_names(effort != "none")}


def thinking_names(thinks: bool) -> dict[str, Any]:
    """As above: whether to think. Templates read one name or the other."""
    return {"enable_thinking": thinks, "thinking": thinks}


def readable(tools: list[dict[str, Any]], inputs: InputProcessor) -> list[dict[str, Any]] | None:
    """The tools that the model is told of; None where there are none.

    Raises:
        ApiError: calls could not be read.
    """
    if not tools:
        return None
    if inputs.dialect.tools is None:
        raise bad_request(
            "tools: this server cannot read the model's calls, because its chat template shows no known format, or"
            " tool_call_parser is none; start the server with --tool-call-parser, or leave tools out",
            "tools",
        )
    return tools


def no_media(where: str, kind: str) -> ApiError:
    """The refusal of what is no text: the client's fault, since clients try again after what is the server's."""
    return bad_request(f"{where}: {kind} cannot be read; this server reads text", where.partition("[")[0])


def unread(where: str, kind: str, warnings: list[str]) -> str:
    """What the model is told instead of a part of a tool's result, which would end every conversation of an agent's."""
    warnings.append(f"{where}: {kind} cannot be read; the model is told so")
    return f"[{kind}: it cannot be read here]"


def call_rules(
    tools: Sequence[Mapping[str, Any]] | None, choice: str | Mapping[str, Any] | None, *, single: bool = False
) -> CallRules | None:
    """What OpenAI's `tool_choice` says of the `tools` that the model is told of; None if it may call none.

    `single`: at most one call. One function that is named is called exactly once.

    Raises:
        ApiError: it is not what it should be, or names a function that is not there.
    """
    if isinstance(choice, str) and choice not in MODES:
        raise bad_request(
            f"tool_choice must be {', '.join(MODES)}, a function or allowed_tools", "tool_choice"
        )
    if choice in (None, "auto", "none") and not tools:
        return None
    if not tools:
        raise bad_request("tool_choice says to call a function, and there are no tools", "tool_choice")
    if choice is None or isinstance(choice, str):
        return (
            None if choice == "none" else CallRules(tools=tools, required=choice == "required", single=single)
        )
    match choice.get("type"):
        case "function":
            return CallRules(tools=_named(tools, [choice]), required=True, single=True)
        case "allowed_tools":
            allowed = choice.get("allowed_tools", choice)
            mode = allowed.get("mode") if isinstance(allowed, Mapping) else None
            if mode not in ("auto", "required"):
                raise refuse("tool_choice.mode", mode, "auto or required")
            return CallRules(
                tools=_named(tools, allowed.get("tools")), required=mode == "required", single=single
            )
    raise refuse("tool_choice.type", choice.get("type"), "function or allowed_tools")


def _named(tools: Sequence[Mapping[str, Any]], chosen: object) -> list[Mapping[str, Any]]:
    """Those of the tools that are chosen: {"type": "function", "function": {"name": ...}}, or the name without that."""
    found, known = [], {tool["function"]["name"]: tool for tool in tools}
    for each in chosen if isinstance(chosen, list) else ():
        named = each.get("function", each) if isinstance(each, Mapping) else None
        name = named.get("name") if isinstance(named, Mapping) else None
        if not isinstance(name, str) or name not in known:
            raise refuse("tool_choice", name, f"one of the tools: {', '.join(known)[:500]}")
        found.append(known[name])
    if not found:
        raise bad_request("tool_choice.tools must name at least one of the tools", "tool_choice")
    return found


def no_such_tool(kind: object) -> str:
    """The warning about a tool that is no function."""
    return f"tools of type {str(kind)[:100]!r} are not known; they had no effect"


def steady(messages: Messages) -> Messages:
    """Without what is volatile at the beginning of the system prompt, or of a part of it."""
    if not messages or messages[0].get("role") not in ("system", "developer"):
        return messages
    content = messages[0].get("content")
    if isinstance(content, str):
        kept: Any = VOLATILE.sub("", content)
    elif isinstance(content, list):
        kept = [part for part in map(_steady_part, content) if part is not None]
    else:
        return messages
    return [{**messages[0], "content": kept}, *messages[1:]] if kept else messages[1:]


def _steady_part(part: object) -> object:
    """None if nothing is left of it."""
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        return part
    text = VOLATILE.sub("", part["text"])
    return {**part, "text": text} if text or not part["text"] else None
