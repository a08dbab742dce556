"""`quire router`: one address for several servers of the same model, until a signal comes."""

import argparse
import contextlib
import dataclasses
import sys

from quire.cli.options import add_flags, config_options
from quire.cli.serve import EVERYWHERE, keys_of_environment, url_of
from quire.cli.starting import starting
from quire.server.router.settings import RouterSettings


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Exit codes: 0 stopped, 2 asked for what cannot be, 130 interrupted."
    add_flags(parser, RouterSettings, "router options")


@starting()
def main(args: argparse.Namespace) -> int:
    settings = RouterSettings(**config_options(args, RouterSettings))
    import asyncio

    import uvloop

    from quire.server.router.site import route
    from quire.server.run import listen

    settings = dataclasses.replace(settings, api_key=settings.api_key or keys_of_environment())
    with contextlib.ExitStack() as stack, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        listener = stack.enter_context(listen(settings))
        url = url_of(settings, listener)

        def announce() -> None:
            lines = [f"Routing to {len(settings.backend)} replicas: {', '.join(settings.backend)}"]
            if settings.host in EVERYWHERE and not (settings.api_key or settings.api_key_file):
                lines.append(
                    "Anybody who reaches this machine can use it: give --api-key-file, or --host 127.0.0.1."
                )
            lines.append(f"Listening at {url}/v1")
            sys.stdout.write("\n".join(lines) + "\n")
            sys.stdout.flush()

        return runner.run(route(settings, listener, announce))
