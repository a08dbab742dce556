"""A process that has loaded the engine's modules and forks engine groups on demand. Knows no messages of theirs.

Python's own forkserver listens at a named socket, sends pickles and runs the caller's main module again in each child;
this one has a socket pair and gets a file descriptor. It ends, and kills its children, when the other end closes.

A group may fork processes itself (ranks). They are in a process group of its first one's number, and end with that.
"""

import asyncio
import contextlib
import importlib
import os
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable

from quire.engine.processes import adopt, command, live
from quire.errors import EngineDead

PACKET = struct.Struct("!cii")
FORK, KILL, BORN, DIED = b"f", b"k", b"b", b"d"
PATIENCE_S = 5.0  # for processes that were killed, which only the kernel can hold up


class Nursery:
    """The frontend's handle, used from one event loop. If the nursery dies, it takes its groups with it.

    `entry` is a module whose `main(socket)` is a group's life.
    """

    def __init__(self, entry: str):
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            number = theirs.fileno()
            self.process = subprocess.Popen(
                command(__name__, str(number), entry), pass_fds=[number], stdin=subprocess.DEVNULL
            )
        self.control.setblocking(False)
        self.loop = asyncio.get_running_loop()
        self.loop.add_reader(self.control, self._read)
        self.born: asyncio.Future[int] | None = None
        self.deaths: dict[int, asyncio.Future[int | None]] = {}  # by process id: its exit status
        self.closed = False

    async def fork(self, sock: socket.socket) -> int:
        """Start a group that owns this socket; returns its process id. The caller closes its own copy.

        Raises:
            EngineDead: the nursery is gone, for example because its modules cannot be imported.
        """
        self.born = self.loop.create_future()
        try:
            socket.send_fds(self.control, [PACKET.pack(FORK, 0, 0)], [sock.fileno()])
        except OSError:
            self._lose()
        return await self.born

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to a group that was not seen to die."""
        if not self.closed and pid in self.deaths and not self.deaths[pid].done():
            with contextlib.suppress(OSError):
                self.control.send(PACKET.pack(KILL, pid, number))

    async def death(self, pid: int) -> int | None:
        """Wait until a group that ends is gone; returns its exit status (negative: the signal), None if unknown."""
        try:
            return await asyncio.wait_for(asyncio.shield(self.deaths[pid]), PATIENCE_S)
        except TimeoutError:
            return None

    def wait(self, pid: int, timeout: float) -> None:
        """As `death`, holding up the event loop: for the end of everything."""
        until = time.monotonic() + timeout
        while not self.closed and pid in self.deaths and not self.deaths[pid].done():
            left = until - time.monotonic()
            if left <= 0 or not select.select([self.control], [], [], left)[0]:
                return
            self._read()

    def close(self) -> None:
        """End the nursery and every group of it, and wait for that; takes milliseconds."""
        self._lose()
        if not self.deaths:  # it may be loading modules still, and would notice only after that
            self.process.kill()
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _lose(self) -> None:
        if self.closed:
            return
        self.closed = True
        self.loop.remove_reader(self.control)
        self.control.close()
        if self.born is not None and not self.born.done():
            self.born.set_exception(EngineDead("the process that starts engines died; see the log"))
        for death in self.deaths.values():
            if not death.done():
                death.set_result(None)

    def _read(self) -> None:
        try:
            data = self.control.recv(PACKET.size)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            for pid, death in self.deaths.items():
                if not death.done():
                    _signal(pid, signal.SIGKILL)
            self._lose()
            return
        kind, pid, status = PACKET.unpack(data)
        if kind == BORN and self.born is not None:
            self.deaths[pid] = self.loop.create_future()
            if not self.born.done():
                self.born.set_result(pid)
        elif kind == DIED and not self.deaths[pid].done():
            self.deaths[pid].set_result(status)


def main(control_fd: str, entry: str) -> None:
    """The nursery's own life; does not return."""
    adopt()
    for number in (signal.SIGINT, signal.SIGTERM):  # the frontend's to handle
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=int(control_fd))
    life: Callable[[socket.socket], None] = importlib.import_module(entry).main
    woken, waker = socket.socketpair()
    for end in (woken, waker):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    groups: dict[
        int, int | None
    ] = {}  # those of which any process is left: the first one's id, its exit status
    while True:
        ready, _, _ = select.select([control, woken], [], [])
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                woken.recv(4096)
            _reap(control, groups)
        if control not in ready:
            continue
        data, fds, _, _ = socket.recv_fds(control, PACKET.size, 1)
        if not data:
            break
        kind, pid, number = PACKET.unpack(data)
        if kind == KILL and pid in groups:  # not reaped yet, so the number is still its own
            _signal(pid, number)
        elif kind == FORK:
            child = os.fork()
            if child == 0:
                os.setpgid(0, 0)
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for end in (control, woken, waker):
                    end.close()
                live(life, socket.socket(fileno=fds[0]))
            with contextlib.suppress(OSError):  # whoever is first; it may have ended, too
                os.setpgid(child, child)
            os.close(fds[0])
            groups[child] = None
            control.send(PACKET.pack(BORN, child, 0))
    for pid in groups:
        _signal(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    os._exit(0)  # taking apart the modules it has loaded would take longer than all of this


def _signal(group: int, number: int) -> bool:
    """Send a signal to a group's processes; False if there are none."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _reap(control: socket.socket, groups: dict[int, int | None]) -> None:
    """Take note of processes that ended. A group whose first one did is ended, and told of when all are gone."""
    with contextlib.suppress(ChildProcessError):
        while (pid := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if pid.si_pid in groups:
                _signal(pid.si_pid, signal.SIGKILL)  # before its number can be another's
            child, status = os.waitpid(pid.si_pid, 0)
            if child in groups:
                groups[child] = os.waitstatus_to_exitcode(status)
    for first, code in list(groups.items()):
        if code is not None and not _signal(first, signal.SIGKILL):
            del groups[first]
            with contextlib.suppress(OSError):  # who closed the other end does not wait for it
                control.send(PACKET.pack(DIED, first, code))
