"""`quire serve` over an engine group with faults: `python tests/faults/serve.py MODEL ...`, in its environment
an `Injection`. Everything else is the command's own.

It writes a line before it imports anything, and counts its tasks on SIGUSR2.
"""

import sys

sys.stdout.write("importing\n")
sys.stdout.flush()

from quire.cli.starting import starting  # noqa: E402

with starting():  # as the command's own imports
    import asyncio
    import functools
    import signal
    import time

    from quire.cli.main import main
    from quire.engine import keeper, remote
    from quire.server import run, sse
    from tests.faults.injection import Board, Injection, jumping_clock

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
