"""`quire serve demo` in processes of its own, as users start it."""

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.processes import started

COMMAND = [sys.executable, "-m", "quire.cli.main", "serve"]
OPTIONS = ["--port", "0", "--device", "cpu", "--kv-cache-memory-bytes", "64M"]


@dataclass
class Served:
    """A running `quire serve`."""

    process: subprocess.Popen[str]
    greeting: list[str]
    log: Path
    first_log: str  # until it was ready

    @property
    def url(self) -> str:
        (line,) = [line for line in self.greeting if line.startswith("Listening at ")]
        return line.split()[2].removesuffix("/v1;")

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)

    def family(self) -> list[int]:
        """The process and those it has started."""
        found = [self.process.pid]
        for pid in found:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                found += map(int, children.read_text().split())
        return found


@contextmanager
def serve(log: Path, *options: str, **environment: str) -> Iterator[Served]:
    command, env = [*COMMAND, "demo", *OPTIONS, *options], {**os.environ, **environment}
    with (
        log.open("w") as errors,
        started(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env) as process,
    ):
        greeting = []
        for line in process.stdout:
            greeting.append(line.rstrip("\n"))
            if line.startswith("curl "):
                break
        else:
            pytest.fail(log.read_text())
        yield Served(process, greeting, log, log.read_text())


def interrupted_at_once(log: Path, path: str, *options: str) -> tuple[str, int]:
    """What a server's first answer says, which is that of `path`; and its exit code after SIGINT then."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [*COMMAND, "demo", *OPTIONS, "--port", str(port), *options]
    with log.open("w") as errors, started(command, stderr=errors) as process:
        while True:
            try:
                said = httpx.get(f"http://127.0.0.1:{port}{path}").text
                break
            except httpx.ConnectError:
                assert process.poll() is None
        process.send_signal(signal.SIGINT)
        return said, process.wait(60)


def gone(pids: list[int]) -> bool:
    """Wait until none of them runs. A process that nobody has waited for is gone too."""
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not select.select([handle], [], [], 20)[0]:
                return False
        finally:
            os.close(handle)
    return True
