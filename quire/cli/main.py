"""Entry of the `quire` command: finds the sub-command, turns errors into one line and an exit code."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Protocol, cast

from quire import __version__
from quire.cli.options import same_dashes
from quire.cli.starting import INTERRUPTED, starting
from quire.errors import EngineDead, QuireError, RequestFailed

COMMANDS = {
    "serve": "Serve a model over HTTP, with OpenAI's and Anthropic's APIs.",
    "router": "Forward requests to several servers of a model, each to where it begins first.",
    "run": "Complete one prompt, streamed to the terminal.",
    "chat": "Talk to a model.",
    "demo": "Talk to the small model that comes with Quire.",
    "bench": "Measure throughput, latency or a server, and compare with what the machine could do.",
    "connect": "Print the settings with which an agent's client uses a running server.",
    "models": "List the architectures that run.",
    "inspect": "Print what a network is, or how two differ.",
    "replay": "Run a recorded schedule again.",
}
FAILED, USER_ERROR = 1, 2


class Command(Protocol):
    """What each module of a sub-command has."""

    def add_options(self, parser: argparse.ArgumentParser) -> None: ...

    def main(self, args: argparse.Namespace) -> int: ...


def main(words: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if the engine failed, 2 if what was asked cannot be done, 130 after Ctrl-C."""
    words = sys.argv[1:] if words is None else words
    name = _command(words[:1])
    # A module meets the protocol by its functions, which the type checker does not see through import_module.
    with starting():
        command = cast(Command, importlib.import_module(f"quire.cli.{name}"))
    parser = argparse.ArgumentParser(prog=f"quire {name}", description=COMMANDS[name], allow_abbrev=False)
    command.add_options(parser)
    args = parser.parse_args(same_dashes(words[1:]))
    try:
        return command.main(args)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (QuireError, OSError) as error:  # OSError: a file that cannot be read or written
        return _report(error)


def _command(words: Sequence[str]) -> str:
    parser = argparse.ArgumentParser(
        prog="quire", description="Serves large language models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"quire {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, help in COMMANDS.items():
        commands.add_parser(name, help=help, add_help=False)
    return str(parser.parse_args(words).command)


def _report(error: Exception) -> int:
    from quire.log import logger

    logger.debug("Where it happened:", exc_info=error)
    sys.stderr.write(f"error: {error}\n")
    return FAILED if isinstance(error, RequestFailed | EngineDead) else USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
