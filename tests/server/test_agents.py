"""Conversations of the shapes that agents' own clients send (docs/agents.md), with the demo model and tools of ours.

Claude Code 2.1.197, Codex 0.171.0, opencode 1.18.33: every field that they send is here, with a text of ours.
"""

import json
from typing import Any

import httpx

from tests.server.conftest import Live

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
SCHEMA = {"$schema": "https://json-schema.org/draft/2020-12/schema", **CITY, "additionalProperties": False}
QUESTION = "What is the weather in Paris?"
RESULT = '{"condition": "sunny", "temperature": 21}'
EPHEMERAL = {"cache_control": {"type": "ephemeral"}}
CLAUDE_HEADERS = {
    "authorization": "Bearer none",
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27,"
    "prompt-caching-scope-2026-01-05,mid-conversation-system-2026-04-07,effort-2025-11-24",
    "anthropic-dangerous-direct-browser-access": "true",
    "x-app": "cli",
}


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    lines = (line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: "))
    return [json.loads(line) for line in lines if line != "[DONE]"]


def text(words: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **more}


def claude(turns: list[dict[str, Any]], build: str) -> dict[str, Any]:
    """A body of Claude Code's. `build` is in the line that it puts in front, and changes."""
    return {
        "model": "demo",
        "max_tokens": 32_000,
        "system": [
            text(f"x-anthropic-billing-header: cc_version=2.1.197.{build}; cc_entrypoint=sdk-cli;"),
            text("You are an agent.", **EPHEMERAL),
            text("\nUse a tool where one helps.", **EPHEMERAL),
        ],
        "tools": [{"name": "get_weather", "description": "Tells the weather.", "input_schema": SCHEMA}],
        "metadata": {"user_id": '{"device_id":"0","account_uuid":"","session_id":"1"}'},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "stream": True,
        "messages": turns,
    }


def blocks(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a stream of Messages adds up to, as Claude Code sends it back."""
    found: list[dict[str, Any]] = []
    inputs = ""
    for event in told:
        if event["type"] == "content_block_start":
            found.append(dict(event["content_block"]))
            inputs = ""
        elif event["type"] == "content_block_delta":
            for name, value in event["delta"].items():
                if name in ("text", "thinking", "signature"):
                    found[-1][name] = found[-1].get(name, "") + value
            inputs += event["delta"].get("partial_json", "")
        elif event["type"] == "content_block_stop" and found[-1]["type"] == "tool_use":
            found[-1]["input"] = json.loads(inputs)
    return found


def test_claude_code_goes_on_with_results_from_the_cache(live: Live) -> None:
    reminder = text("<system-reminder>\n# currentDate\nToday is 2026-11-29.\n</system-reminder>\n\n")
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": [reminder, text("Hello!")]},
        {"role": "system", "content": "Available agent types for the Agent tool:\n- Explore: reads"},
        {"role": "assistant", "content": [text("Hello! How can I help?")]},
        {"role": "user", "content": [text(QUESTION, **EPHEMERAL)]},
    ]
    told = events(live.post("/v1/messages?beta=true", json=claude(turns, "5b8"), headers=CLAUDE_HEADERS))
    assert told[0]["message"]["warnings"] == ["'context_management' has no effect on this server"]
    said = blocks(told)
    assert said[-1]["name"] == "get_weather" and said[-1]["input"] == {"city": "Paris"}
    first = told[-2]
    assert first["delta"]["stop_reason"] == "tool_use"
    result = {"type": "tool_result", "tool_use_id": said[-1]["id"], "content": RESULT, "is_error": False}
    turns += [{"role": "assistant", "content": said}, {"role": "user", "content": [{**result, **EPHEMERAL}]}]
    told = events(live.post("/v1/messages?beta=true", json=claude(turns, "0c1"), headers=CLAUDE_HEADERS))
    assert told[-2]["delta"]["stop_reason"] == "end_turn"
    assert "21" in blocks(told)[-1]["text"] and "sunny" in blocks(told)[-1]["text"]
    read = sum(first["usage"][name] for name in ("input_tokens", "cache_read_input_tokens"))
    assert told[-2]["usage"]["cache_read_input_tokens"] > 0.8 * read


def opencode(turns: list[dict[str, Any]]) -> dict[str, Any]:
    function = {"name": "get_weather", "description": "Tells the weather.", "parameters": SCHEMA}
    return {
        "model": "demo",
        "max_tokens": 32_000,
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "auto",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": turns,
    }


def test_opencode_goes_on_with_results_from_the_cache(live: Live) -> None:
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": "You are an agent.\nUse a tool where one helps."},
        {"role": "user", "content": QUESTION},
    ]
    told = events(live.post("/v1/chat/completions", json=opencode(turns)))
    assert "warnings" not in told[0]
    deltas = [chunk["choices"][0]["delta"] for chunk in told if chunk["choices"]]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    function = {"name": calls[0]["function"]["name"], "arguments": ""}
    function["arguments"] = "".join(call["function"]["arguments"] for call in calls)
    assert function["name"] == "get_weather" and json.loads(function["arguments"]) == {"city": "Paris"}
    call = {"id": calls[0]["id"], "type": "function", "function": function}
    turns += [
        {"role": "assistant", "content": "", "reasoning_content": "I look it up.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": calls[0]["id"], "content": RESULT},
    ]
    read = told[-1]["usage"]["prompt_tokens"]
    told = events(live.post("/v1/chat/completions", json=opencode(turns)))
    words = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in told if chunk["choices"])
    assert "21" in words and "sunny" in words
    assert told[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0.8 * read


def codex(items: list[dict[str, Any]]) -> dict[str, Any]:
    function = {"type": "function", "name": "get_weather", "description": "Tells the weather."}
    agents = {"type": "namespace", "name": "multi_agent_v1", "description": "Agents.", "tools": [function]}
    return {
        "model": "demo",
        "tools": [{**function, "strict": False, "parameters": SCHEMA}, agents],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "01a22971-37e3-7d50-bc13-aa47e2e61df7",
        "client_metadata": {"thread_id": "01a22971-37e3-7d50-bc13-aa47e2e61df7"},
        "input": items,
    }


def item(role: str, words: str, given: str) -> dict[str, Any]:
    return {"type": "message", "id": given, "role": role, "content": [{"type": "input_text", "text": words}]}


def test_codex_goes_on_with_results_from_the_cache(live: Live) -> None:
    items = [
        item("developer", "You are an agent.", "msg_1"),
        item("developer", "<permissions instructions>\nRead only.\n</permissions instructions>", "msg_2"),
        item("user", "<environment_context>\n  <cwd>/tmp</cwd>\n</environment_context>", "msg_3"),
        item("user", QUESTION, "msg_4"),
    ]
    done = events(live.post("/v1/responses", json=codex(items)))[-1]["response"]
    assert done["warnings"] == [
        "'reasoning.summary' has no effect on this server",
        "tools of type 'namespace' are not known; they had no effect",
    ]
    call = done["output"][-1]
    assert call["name"] == "get_weather" and json.loads(call["arguments"]) == {"city": "Paris"}
    result = {"type": "function_call_output", "id": "fco_1", "call_id": call["call_id"], "output": RESULT}
    again = events(live.post("/v1/responses", json=codex([*items, *done["output"], result])))[-1]["response"]
    words = again["output"][-1]["content"][0]["text"]
    assert "21" in words and "sunny" in words
    cached = again["usage"]["input_tokens_details"]["cached_tokens"]
    assert cached > 0.8 * done["usage"]["input_tokens"]
