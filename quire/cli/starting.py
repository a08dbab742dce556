"""How Ctrl-C ends a command that is still starting."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130  # the exit code


@contextmanager
def starting() -> Iterator[None]:
    """Until this is over, or what has started handles SIGINT itself, SIGINT ends the process at once.

    `KeyboardInterrupt` would not always: what is being imported may catch it, and the command would go on. SIGTERM does
    anyway. Processes that were started end by themselves, as after SIGKILL.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # otherwise it is ignored, as in a shell's background jobs
        signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(number: int, frame: FrameType | None) -> None:
    try:
        os.write(2, b"interrupted\n")
    finally:
        os._exit(INTERRUPTED)
