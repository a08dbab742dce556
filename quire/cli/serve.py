"""`quire serve`: OpenAI's API over a model, until a signal comes."""

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import socket
import sys
from typing import TYPE_CHECKING, Protocol

from quire.cli.options import add_config_options, add_flags, config_from, config_options
from quire.cli.starting import starting
from quire.engine.site import located, site_of
from quire.server.settings import ServerSettings

if TYPE_CHECKING:
    from quire.engine.wire import Facts


class Secured(Protocol):
    """Where a server listens, and whether by HTTPS."""

    @property
    def host(self) -> str: ...

    @property
    def ssl_certfile(self) -> str | None: ...


EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
QUESTION = "What is the capital of France?"
SHOWN = (
    "dtype",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "num_threads",
    "block_size",
    "deterministic",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Exit codes: 0 stopped, 1 failed, 2 asked for what cannot be, 70 engine dead, 130 interrupted."
    )
    add_config_options(parser)
    add_flags(parser, ServerSettings, "server options")


@starting()
def main(args: argparse.Namespace) -> int:
    settings, config = ServerSettings(**config_options(args, ServerSettings)), located(config_from(args))
    if site_of(config).process:
        from quire.engine.node import serve_ranks  # loads torch

        return serve_ranks(config)
    import asyncio

    import uvloop

    from quire.engine.groups import keeper_of
    from quire.engine.metrics import Metrics
    from quire.engine.remote import RemoteEngine
    from quire.server.auth import admission_of
    from quire.server.run import listen, listen_several, serve, serve_several

    settings = dataclasses.replace(
        settings,
        served_model_name=settings.served_model_name or (config.model,),
        api_key=settings.api_key or keys_of_environment(),
    )
    admission = admission_of(settings)
    several = settings.api_server_count > 1
    with contextlib.ExitStack() as stack, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        listeners = listen_several(settings) if several else [listen(settings)]
        url = url_of(settings, [stack.enter_context(listener) for listener in listeners][0])

        def announce(facts: "Facts", chat: str | None) -> None:
            sys.stdout.write("\n".join(greeting(facts, settings, url, chat=chat)) + "\n")
            sys.stdout.flush()

        if several:
            metrics = Metrics(config.model, log_stats=not config.disable_log_stats)
            keeper = keeper_of(config, metrics, admission=admission)
            return runner.run(serve_several(keeper, config, settings, listeners, announce))
        engine = RemoteEngine(config, admission=admission)

        def ready() -> None:
            announce(engine.facts, engine.inputs.chat)

        return runner.run(serve(engine, settings, listeners[0], ready))


def keys_of_environment() -> tuple[str, ...]:
    """Keys that are in no command line and in no file; the processes that are started do not inherit them."""
    return tuple(os.environ.pop("QUIRE_API_KEY", "").split())


def url_of(settings: "Secured", listener: socket.socket) -> str:
    """Where this machine's programs reach the server."""
    host = EVERYWHERE.get(settings.host, f"[{settings.host}]" if ":" in settings.host else settings.host)
    scheme = "https" if settings.ssl_certfile else "http"
    return f"{scheme}://{host}:{listener.getsockname()[1]}"


def greeting(facts: "Facts", settings: ServerSettings, url: str, *, chat: str | None) -> list[str]:
    """What is served, what was derived and why, and a command to try it."""
    lines = [f"Serving {', '.join(settings.served_model_name)}: {facts.summary}"]
    lines += [
        f"  {name} {facts.options[name]}: {facts.reasons[name]}" for name in SHOWN if name in facts.reasons
    ]
    lines += [f"  Of answers it reads {chat}."] if chat else []
    keys = bool(settings.api_key or settings.api_key_file)
    if settings.host in EVERYWHERE and not keys:
        lines.append("Anybody who reaches this machine can use it: give --api-key-file, or --host 127.0.0.1.")
    lines.append(f"Listening at {url}/v1; try:")
    return [*lines, curl(url, chat=chat is not None, keys=keys)]


def curl(url: str, *, chat: bool, keys: bool) -> str:
    """A command that works as it is printed; with keys, once KEY is set."""
    body: dict[str, object] = {"prompt": "Once upon a time"}
    if chat:
        body = {"messages": [{"role": "user", "content": QUESTION}]}
    path = "chat/completions" if chat else "completions"
    words = ["curl", f"{url}/v1/{path}", "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    command = shlex.join(words)
    return f'{command} -H "Authorization: Bearer $KEY"' if keys else command
