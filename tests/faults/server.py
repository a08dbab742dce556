"""A server under test in processes of its own: how it starts, what can be seen of it, and what is left of it."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.faults.client import get
from tests.faults.injection import Board, Injection

ROOT = Path(__file__).parent.parent.parent
COMMAND = [sys.executable, "-m", "tests.faults.serve", "demo"]
OPTIONS = ["--device", "cpu", "--num-threads", "1", "--kv-cache-memory-bytes", "64M", "--disable-access-log"]
RUN = "FAULTS_RUN"  # in the environment of all processes of a server
SHARED = Path("/dev/shm")


async def until(holds: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until something holds that nobody tells.

    Raises:
        TimeoutError: it did not.
    """
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.002)


@dataclass
class Server:
    """A running server, and whatever belongs to it."""

    process: subprocess.Popen[bytes]
    url: str
    board: Board
    folder: Path
    run: str
    shared: set[str]  # names in /dev/shm before it began

    def log(self) -> str:
        return (self.folder / "log").read_text()

    async def said(self, text: str) -> None:
        """Wait until it has printed something."""
        await until(lambda: text in (self.folder / "out").read_text() or self.process.poll() is not None)
        assert text in (self.folder / "out").read_text(), f"exit code {self.process.returncode}: {self.log()}"

    async def readyz(self, status: int) -> None:
        async with asyncio.timeout(60):
            while (await get(self.url, "/readyz"))[0] != status:
                await asyncio.sleep(0.002)

    async def status(self, text: str) -> None:
        """Wait until /readyz says so."""
        async with asyncio.timeout(60):
            while (await get(self.url, "/readyz"))[1] != text:
                await asyncio.sleep(0.002)

    async def metric(self, name: str, **labels: str) -> float:
        """A metric's value, over all label values that are not named."""
        status, text = await get(self.url, "/metrics")
        assert status == 200, text
        found = [line for line in text.splitlines() if line.partition("{")[0].partition(" ")[0] == name]
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(float(line.rpartition(" ")[2]) for line in found if all(w in line for w in wanted))

    async def num_restarts(self) -> int:
        return int(await self.metric("quire:engine_restarts_total"))

    async def idle(self, seconds: float = 30.0) -> None:
        """Wait until nothing runs or waits, and no block of the cache is used."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        async with asyncio.timeout(seconds):
            while any([await self.metric(name) for name in names]):
                await asyncio.sleep(0.01)

    async def num_tasks(self) -> int:
        """Of the frontend's event loop."""
        before = self.board.get("reports")
        self.process.send_signal(signal.SIGUSR2)
        await until(lambda: self.board.get("reports") > before)
        return self.board.get("tasks")

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    async def exit_code(self, seconds: float = 60.0) -> int:
        await until(lambda: self.process.poll() is not None, seconds)
        return self.process.returncode

    def family(self) -> list[int]:
        """Every process of this server, also those whose parent is gone."""
        mark, found = f"{RUN}={self.run}".encode(), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    environment = (entry / "environ").read_bytes()
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                except OSError:
                    continue
                if mark in environment.split(b"\0") and state not in "ZX":
                    found.append(int(entry.name))
        return found

    def open_files(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/fd").iterdir())

    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE")

    def is_listening(self) -> bool:
        port = int(self.url.rpartition(":")[2])
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", port)) == 0

    def left(self) -> list[str]:
        """What there still is of it."""
        found = [f"process {pid}" for pid in self.family()]
        found += ["its port"] if self.is_listening() else []
        found += [f"/dev/shm/{name}" for name in shared_memory() - self.shared]
        return found + [f"file {path.name}" for path in (self.folder / "tmp").iterdir()]

    async def gone(self, seconds: float = 10.0) -> float:
        """Wait until nothing is left; returns how long that took.

        Raises:
            AssertionError: something stays.
        """
        began = time.monotonic()
        while left := self.left():
            assert time.monotonic() - began < seconds, f"left behind: {left}"
            await asyncio.sleep(0.005)
        return time.monotonic() - began


def shared_memory() -> set[str]:
    return {path.name for path in SHARED.iterdir()} if SHARED.exists() else set()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def start(folder: Path, *options: str, **faults: object) -> Server:
    """Start a server, and wait for nothing."""
    port, run = free_port(), uuid.uuid4().hex
    injection = Injection(board=str(folder / "board"), **faults)  # type: ignore[arg-type]
    (folder / "tmp").mkdir()
    shared = shared_memory()
    environment = {**os.environ, **injection.environment(), RUN: run, "TMPDIR": str(folder / "tmp")}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    board = Board(injection.board)
    with (folder / "out").open("wb") as out, (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*COMMAND, *OPTIONS, "--port", str(port), *options],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=log,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
    return Server(process, f"http://127.0.0.1:{port}", board, folder, run, shared)


@asynccontextmanager
async def serving(folder: Path, *options: str, **faults: object) -> AsyncIterator[Server]:
    """A server that is ready; nothing of it is left afterwards, whatever happened."""
    server = start(folder, *options, **faults)
    try:
        await server.said("\ncurl ")
        yield server
    finally:
        finish(server)


def finish(server: Server) -> None:
    """End what is left of it, by process id."""
    for pid in server.family():
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    server.process.wait(30)
