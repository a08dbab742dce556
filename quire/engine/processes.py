"""How processes of the engine begin and end. Knows no messages and no device."""

import ctypes
import json
import os
import select
import socket
import sys
import traceback
from collections.abc import Callable, Collection

BOOT = (  # the same modules as here, and none of the folder that somebody is in
    "import importlib, json, sys; sys.path[:] = json.loads(sys.argv[2])\n"
    "importlib.import_module(sys.argv[1]).main(*sys.argv[3:])"
)
PR_SET_CHILD_SUBREAPER = 36
CLOSED = select.POLLRDHUP if sys.platform == "linux" else 0  # of TCP; of others, hang-ups are always reported


def command(module: str, *arguments: str) -> list[str]:
    """Starts a new Python whose life is `module.main(*arguments)`."""
    return [sys.executable, "-P", "-c", BOOT, module, json.dumps(sys.path), *arguments]


def live(life: Callable[[socket.socket], None], sock: socket.socket) -> None:
    """All that a forked child does: nothing of its parent's may run after it."""
    status = 1
    try:
        life(sock)
        status = 0
    except BaseException:  # also SystemExit: what it means is said by the status
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def hang_up(socks: Collection[int]) -> None:
    """Wait until the other end of one of these sockets, by their descriptors, is closed."""
    poll = select.poll()
    for sock in socks:
        poll.register(sock, CLOSED)
    poll.poll()


def adopt() -> None:
    """Be the parent of children's children that are left alone, where that is possible (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
