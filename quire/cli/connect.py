"""`quire connect`: the settings with which a coding agent's own command-line client uses a running server.

They are written for Claude Code 2.1, Codex 0.171 and opencode 1.18 (docs/agents.md has what was run with them).
"""

import argparse
import asyncio
import json
import os
import shlex
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import NamedTuple

from quire.cli.client import Client, refusal
from quire.errors import ConfigError, RequestFailed

URL, KEY = "http://127.0.0.1:8000", "QUIRE_API_KEY"
MAX_OUTPUT_TOKENS = 32_000  # what opencode asks for at most, whatever its settings say


class Target(NamedTuple):
    """A model of a server. `keyed`: requests need the key that the environment's QUIRE_API_KEY has."""

    url: str
    model: str
    max_model_len: int
    keyed: bool


class Agent(NamedTuple):
    """A client: what its settings are, where they go, and what comes then."""

    settings: Callable[[Target], str]
    advice: str


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"Settings go to standard output; of a key, which {KEY} has, they hold only that name."
    parser.add_argument("agent", choices=AGENTS, help="Whose settings to print.")
    parser.add_argument("--url", metavar="URL", default=URL, help=f"Of the server ({URL}).")
    parser.add_argument("--model", metavar="NAME", help="One of the server's names; without it the first.")


def main(args: argparse.Namespace) -> int:
    """Raises ConfigError, RequestFailed: nobody answers, the key is not valid, or there is no such model."""
    agent = AGENTS[args.agent]
    sys.stdout.write(agent.settings(asyncio.run(_target(args.url, args.model))))
    sys.stderr.write(agent.advice + "\n")
    return 0


async def _target(url: str, model: str | None) -> Target:
    """What there is at `url`, which is asked without a key first, and with one if it wants one."""
    url = url.rstrip("/").removesuffix("/v1")
    status, body = await _models(url, None)
    keyed = status == HTTPStatus.UNAUTHORIZED
    if keyed:
        key = os.environ.get("QUIRE_API_KEY", "")
        if not key:
            raise ConfigError(f"{url} needs a key; set {KEY} to one of its keys, here and for the agent")
        status, body = await _models(url, key)
    if status != HTTPStatus.OK:
        raise RequestFailed(f"{url}/v1/models: {refusal(status, body)}")
    try:
        lengths = {card["id"]: int(card["max_model_len"]) for card in json.loads(body)["data"]}
    except (ValueError, LookupError, TypeError):
        raise RequestFailed(f"{url}/v1/models does not answer as Quire does; is this its address?") from None
    name = next(iter(lengths), "") if model is None else model
    if name not in lengths:
        raise ConfigError(f"model is {name!r}; {url} has {', '.join(lengths) or 'none'}")
    return Target(url, name, lengths[name], keyed)


async def _models(url: str, key: str | None) -> tuple[int, bytes]:
    pieces: list[bytes] = []
    async with Client(url, {} if key is None else {"Authorization": f"Bearer {key}"}) as client:
        reply = await client.send("/v1/models", None, lambda piece, now: pieces.append(piece))
    return reply.status, b"".join(pieces)


def _claude(target: Target) -> str:
    """Shell commands. Every tier of Anthropic's models is this one, since subagents ask for tiers by name."""
    tiers = {f"ANTHROPIC_DEFAULT_{tier}_MODEL": target.model for tier in ("OPUS", "SONNET", "HAIKU", "FABLE")}
    values = {
        "ANTHROPIC_BASE_URL": target.url,
        "ANTHROPIC_MODEL": target.model,
        **tiers,
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(target.max_model_len),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    token = f'"${KEY}"' if target.keyed else "none"  # without any it wants a login
    lines = ["unset ANTHROPIC_API_KEY", f"export ANTHROPIC_AUTH_TOKEN={token}"]
    return "\n".join([*lines, *(f"export {name}={shlex.quote(value)}" for name, value in values.items()), ""])


def _codex(target: Target) -> str:
    """A file in TOML, whose strings JSON's are."""
    lines = [
        f"model = {_quoted(target.model)}",
        'model_provider = "quire"',
        f"model_context_window = {target.max_model_len}",
        'web_search = "disabled"',
        "check_for_update_on_startup = false",
        "",
        "[analytics]",
        "enabled = false",
        "",
        "[model_providers.quire]",
        'name = "Quire"',
        f"base_url = {_quoted(target.url + '/v1')}",
        'wire_api = "responses"',
    ]
    return "\n".join([*lines, *([f"env_key = {_quoted(KEY)}"] if target.keyed else []), ""])


def _opencode(target: Target) -> str:
    """A file in JSON."""
    key = {"apiKey": f"{{env:{KEY}}}"} if target.keyed else {}
    limit = {
        "context": target.max_model_len,
        "output": min(MAX_OUTPUT_TOKENS, target.max_model_len // 4),  # so much is kept free for an answer
    }
    name = f"quire/{target.model}"
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "Quire",
        "options": {"baseURL": f"{target.url}/v1", **key},
        "models": {target.model: {"limit": limit}},
    }
    settings = {
        "$schema": "https://opencode.ai/config.json",
        "model": name,
        "small_model": name,
        "autoupdate": False,
        "share": "disabled",
        "provider": {"quire": provider},
    }
    return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


AGENTS = {
    "claude": Agent(
        _claude, "These are shell commands; give them to eval, then start claude in the same shell."
    ),
    "codex": Agent(_codex, "This belongs into ~/.codex/config.toml; then start codex."),
    "opencode": Agent(_opencode, "This belongs into ~/.config/opencode/opencode.json; then start opencode."),
}
