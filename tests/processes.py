"""Processes that tests start: no test waits for one that does not end."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def started(*args: Any, **options: Any) -> Iterator["subprocess.Popen[Any]"]:
    """A process, of the arguments of `subprocess.Popen`; what still runs at the end of the block is killed."""
    with subprocess.Popen(*args, **options) as process:
        try:
            yield process
        finally:
            process.kill()
