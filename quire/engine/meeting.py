"""Where ranks of other machines, or that a launcher started, meet rank 0: connections of those that know a secret.

Both sides prove, by turns, that they know it; it does not travel, and nothing else is read before. What travels after
that is neither encrypted nor signed: it is for a network whose machines trust each other.

    rank 0 -> rank    32 random bytes
    rank -> rank 0    32 random bytes, HMAC-SHA256(secret, "rank" + rank 0's + its own)
    rank 0 -> rank    HMAC-SHA256(secret, "rank 0" + the rank's + its own); zeros if the rank's was wrong
    rank -> rank 0    Hello
"""

import asyncio
import hmac
import secrets
import socket
import sys
from collections.abc import Collection
from contextlib import closing

from quire import __version__
from quire.engine.wire import CHUNK_BYTES, Channel, Failed, Message
from quire.errors import ConfigError, EngineDead, PeerLost, QuireError
from quire.log import logger

NONCE_BYTES = PROOF_BYTES = 32
HANDSHAKE_S = 5.0
MOST_STRANGERS = 64  # connections whose other side has not shown who it is
GATHER_S = 600.0  # for all to come
IDLE_S, INTERVAL_S, MOST_LOST = (
    4,
    2,
    3,
)  # a silent connection is asked for a sign of life, and given up without one

EVERYWHERE = ("", "0.0.0.0", "::")

Address = tuple[str, int]


class Hello(Message, frozen=True):
    """First from a rank that came by itself: which one it is, of how many, of which version of Quire."""

    rank: int
    size: int
    version: str


class Meeting:
    """Rank 0's listening socket, open until all are there.

    Raises:
        ConfigError: the address is not this machine's, or in use.
    """

    def __init__(self, address: Address, secret: bytes):
        if address[0] in EVERYWHERE:
            raise ConfigError(
                f"master_addr is {address[0]!r}, which is every network of this machine; give the address at which the"
                " others reach it (--master-addr)"
            )
        try:
            family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
            self.listener = socket.create_server(address, family=family)
        except OSError as error:
            raise ConfigError(
                f"rank 0 cannot listen at {address[0]}:{address[1]}, where the others are to meet it: {error.strerror};"
                " give an address of this machine, and a port that is free (--master-addr, --master-port)"
            ) from None
        self.secret = secret

    @property
    def address(self) -> Address:
        """Where it listens, in numbers."""
        host, port, *_ = self.listener.getsockname()
        return host, port

    def gather(
        self, ranks: Collection[int], size: int, timeout_s: float = GATHER_S
    ) -> dict[int, socket.socket]:
        """Wait for these ranks of a group of `size`; of one that comes twice, the later connection counts.

        Raises:
            PeerLost: not all came in time.
        """
        self.listener.setblocking(False)
        with closing(self.listener):
            return asyncio.run(_Reception(self.listener, self.secret, ranks, size).run(timeout_s))


class _Reception:
    def __init__(self, listener: socket.socket, secret: bytes, ranks: Collection[int], size: int):
        self.listener, self.secret, self.ranks, self.size = listener, secret, ranks, size
        self.found: dict[int, socket.socket] = {}
        self.complete = asyncio.Event()
        self.strangers: set[asyncio.Task[None]] = set()

    async def run(self, timeout_s: float) -> dict[int, socket.socket]:
        accepting = asyncio.create_task(self._accept())
        try:
            await asyncio.wait_for(self.complete.wait(), timeout_s)
        except TimeoutError:
            missing = ", ".join(str(rank) for rank in self.ranks if rank not in self.found)
            for sock in self.found.values():
                sock.close()
            raise PeerLost(
                f"ranks {missing} of {self.size} did not come within {timeout_s:g} s; is the same command running for"
                " them, and does it reach this machine?"
            ) from None
        finally:
            tasks = [accepting, *self.strangers]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for sock in self.found.values():
            sock.setblocking(True)
            watch_over(sock)
        return self.found

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(self.listener)
            if len(self.strangers) >= MOST_STRANGERS:
                sock.close()
                continue
            task = asyncio.create_task(self._greet(sock))
            self.strangers.add(task)
            task.add_done_callback(self.strangers.discard)

    async def _greet(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        host, port, *_ = sock.getpeername()
        where, kept = f"{host}:{port}", False
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                kept = await self._admit(sock, where)
        except (OSError, QuireError) as error:
            logger.warning("%s did not show that it is a rank: %s", where, str(error) or "it took too long")
        finally:
            if not kept:
                sock.close()

    async def _admit(self, sock: socket.socket, where: str) -> bool:
        loop, nonce = asyncio.get_running_loop(), secrets.token_bytes(NONCE_BYTES)
        await loop.sock_sendall(sock, nonce)
        theirs = await _exactly(sock, NONCE_BYTES + PROOF_BYTES)
        other = theirs[:NONCE_BYTES]
        if not hmac.compare_digest(theirs[NONCE_BYTES:], _proof(self.secret, b"rank", nonce, other)):
            await loop.sock_sendall(sock, bytes(PROOF_BYTES))
            raise EngineDead("it does not know the secret")
        await loop.sock_sendall(sock, _proof(self.secret, b"rank 0", other, nonce))
        channel = Channel(sock, incoming=Hello)
        messages: list[Hello] = []
        while not messages:
            if not (data := await loop.sock_recv(sock, CHUNK_BYTES)):
                raise EngineDead("it is gone")
            messages = list(channel.decode(data))
        if (reason := self._why_not(messages[0])) is not None:
            logger.error("%s is refused: %s", where, reason)
            await loop.sock_sendall(sock, channel.encode(Failed("ConfigError", reason)))
            return False
        rank = messages[0].rank
        if rank in self.found:
            self.found[rank].close()
        self.found[rank] = sock
        logger.info("rank %d is here, from %s", rank, where)
        if len(self.found) == len(self.ranks):
            self.complete.set()
        return True

    def _why_not(self, hello: Hello) -> str | None:
        if hello.version != __version__:
            return f"it has Quire {hello.version}, and rank 0 has {__version__}; install the same on all machines"
        if hello.size != self.size:
            return (
                f"its command makes a group of {hello.size} ranks, and that of rank 0 one of {self.size}; start both"
                " with the same options"
            )
        if hello.rank not in self.ranks:
            return (
                f"it is rank {hello.rank}, and those that come from elsewhere are {', '.join(map(str, self.ranks))};"
                " give each machine its own node_rank"
            )
        return None


def join(address: Address, secret: bytes, rank: int, size: int) -> socket.socket:
    """A rank's connection to rank 0.

    Raises:
        OSError, EngineDead: rank 0 is not there now.
        ConfigError: it does not know the secret.
    """
    sock = socket.create_connection(address, timeout=HANDSHAKE_S)
    try:
        mine, nonce = secrets.token_bytes(NONCE_BYTES), _take(sock, NONCE_BYTES)
        sock.sendall(mine + _proof(secret, b"rank", nonce, mine))
        if not hmac.compare_digest(_take(sock, PROOF_BYTES), _proof(secret, b"rank 0", mine, nonce)):
            raise ConfigError(
                f"rank 0 at {address[0]}:{address[1]} has another secret; give all machines the same launch_secret_file"
            )
        sock.sendall(Channel(sock).encode(Hello(rank, size, __version__)))
        sock.settimeout(None)
        watch_over(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def watch_over(sock: socket.socket) -> None:
    """Have the system notice within seconds that the other machine is gone; and send small messages at once."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, INTERVAL_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, MOST_LOST)
        lost_ms = (IDLE_S + INTERVAL_S * MOST_LOST) * 1000
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, lost_ms)  # the same of what was sent


def _proof(secret: bytes, who: bytes, *nonces: bytes) -> bytes:
    return hmac.digest(secret, who + b"".join(nonces), "sha256")


def _take(sock: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        if not (more := sock.recv(num_bytes - len(data))):
            raise EngineDead("rank 0 is gone")
        data += more
    return data


async def _exactly(sock: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        if not (more := await asyncio.get_running_loop().sock_recv(sock, num_bytes - len(data))):
            raise EngineDead("it is gone")
        data += more
    return data
