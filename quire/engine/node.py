"""A process that has ranks of an engine whose rank 0 is elsewhere: starts them, again and again, until that is gone.

Each rank is forked with a connection to rank 0, and lives as `engine/rank.py` says. If the group ends, so do they, and
the next ones meet the group that follows; requests go on there. Ends with an exit code other than 0, always.
"""

import os
import signal
import socket
import sys
import time
from functools import partial

from quire.config import Config
from quire.engine.device import mesh_of
from quire.engine.meeting import Address, join
from quire.engine.processes import hang_up, live
from quire.engine.rank import REFUSED, Seat, serve
from quire.engine.site import secret_of, site_of
from quire.errors import ConfigError, EngineDead
from quire.log import logger
from quire.parallel import shared_memory

LEADER_GONE = 70  # the exit code; as of a server whose engine is dead
COME_S = 600.0  # for rank 0 to be there at first, or again where its machine does not answer
GONE_S = 30.0  # the same where the machine says that nobody listens
PAUSE_S = 0.2  # between two attempts


def serve_ranks(config: Config, *, gone_s: float = GONE_S) -> int:
    """The life of such a process; returns its exit code.

    Raises:
        ConfigError: what was asked for cannot be, or rank 0 has another secret.
    """
    site, size, secret = site_of(config), mesh_of(config).size, secret_of(config)
    ranks, address, patience_s = site.ranks(size), (site.address, site.port), COME_S
    named = f"ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}"
    while True:
        logger.info("%s of %d: waiting for rank 0 at %s:%d", named, size, *address)
        socks = _meet(address, secret, ranks, size, patience_s)
        if socks is None:
            logger.error("rank 0 is gone")
            return LEADER_GONE
        logger.info("%s of %d: at work", named, size)
        if REFUSED in _life(socks, ranks, site.index * len(ranks)):
            raise ConfigError("rank 0 refuses the ranks of this process; the log says why")
        logger.warning("%s of %d: the group ended", named, size)
        patience_s = gone_s


def _meet(
    address: Address, secret: bytes, ranks: range, size: int, patience_s: float
) -> list[socket.socket] | None:
    """A connection for each rank; None if rank 0 does not come."""
    begin, socks = time.monotonic(), list[socket.socket]()
    while len(socks) < len(ranks):
        try:
            socks.append(join(address, secret, ranks[len(socks)], size))
            continue
        except ConnectionRefusedError:
            limit_s = patience_s
        except (OSError, EngineDead):
            limit_s = COME_S
        for sock in socks:  # to a group that may have ended meanwhile
            sock.close()
        socks.clear()
        if time.monotonic() - begin > limit_s:
            return None
        time.sleep(PAUSE_S)
    return socks


def _life(socks: list[socket.socket], ranks: range, first: int) -> list[int]:
    """Ranks from their start until one of them, or rank 0, is gone; returns how they ended."""
    segment = shared_memory.make_segment() if len(ranks) > 1 and sys.platform == "linux" else None
    lives, pids = list[socket.socket](), list[int]()
    for index, sock in enumerate(socks):
        ours, theirs = socket.socketpair()  # closes when either process is gone
        pid = os.fork()
        if not pid:
            for other in (ours, *lives, *(s for s in socks if s is not sock)):
                other.close()
            seat = Seat(first + index, ranks, segment)
            live(partial(serve, seat=seat, parent=theirs), sock)
        theirs.close()
        lives.append(ours)
        pids.append(pid)
    hang_up([sock.fileno() for sock in (*socks, *lives)])
    ends = []
    for pid in pids:
        os.kill(pid, signal.SIGKILL)  # does nothing to one that has ended
        ends.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    for sock in (*socks, *lives):
        sock.close()
    if segment is not None:
        os.close(segment)
    return ends
