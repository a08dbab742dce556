"""`quire serve` over an engine group with faults: `python tests/faults/serve.py MODEL ...`, in its environment
an `Injection`. Everything else is the command's own.

It writes a line before it imports anything, and counts its tasks on SIGUSR2.
"""

import sys

sys.stdout.write("importing\n")
sys.stdout.flush()

import asyncio  # noqa: E402
import functools  # noqa: E402
import signal  # noqa: E402
import time  # noqa: E402

from quire.cli.main import main  # noqa: E402
from quire.engine import keeper, remote  # noqa: E402
from quire.server import run, sse  # noqa: E402
from tests.faults.injection import Board, Injection, jumping_clock  # noqa: E402

ENTRY = "tests.faults.group"


def prepare(injection: Injection) -> None:
    """Put in the engine group with faults, the limits of this run, and the counter of tasks."""
    board, serve = Board(injection.board), run.serve

    def report() -> None:
        board.set("tasks", len(asyncio.all_tasks()))
        board.count("reports")

    @functools.wraps(serve)
    async def observed(*args: object, **options: object) -> int:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, report)
        return await serve(*args, **options)

    run.serve = observed
    faults = {"entry": ENTRY, "hang_s": injection.hang_s}
    remote.RemoteEngine = functools.partial(remote.RemoteEngine, **faults)
    keeper.Keeper = functools.partial(keeper.Keeper, **faults)
    sse.EventStream.__init__.__kwdefaults__["stall_s"] = injection.stall_s
    if injection.wrong_clock:
        time.time = jumping_clock(time.time)


if __name__ == "__main__":
    prepare(Injection.read())
    sys.exit(main(["serve", *sys.argv[1:]]))
