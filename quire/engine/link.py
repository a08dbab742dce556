"""One end of a socket between two processes, in an event loop."""

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Any, cast

from quire.engine.wire import Channel, Message, Refused, WireError
from quire.log import logger


class Link(asyncio.Protocol):
    """Reads what the other process says, in pieces as they come. `closed` is done when it is gone.

    Args:
        incoming: the union of messages that may come.
        heard: takes in those that came together.
    """

    def __init__(
        self, sock: socket.socket, heard: Callable[[Sequence[Message]], None], *, incoming: Any
    ) -> None:
        self.channel, self.heard = Channel(sock, incoming=incoming), heard
        self.transport: asyncio.Transport | None = None
        self.closed = asyncio.get_running_loop().create_future()

    async def connect(self) -> None:
        """Begin to listen. The socket is the link's from now on."""
        make = asyncio.get_running_loop().create_unix_connection
        try:
            await make(lambda: self, sock=self.channel.sock)
        except BaseException:
            self.transport = None  # closed, without a word to its protocol
            self.channel.sock.close()
            raise

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        try:
            self.heard(self._messages(data))
        except Exception:  # who cannot be understood is one that broke
            logger.exception("a message of another process cannot be read")
            self.close()

    def _messages(self, data: bytes) -> list[Message]:
        """What is complete; one that cannot be read, but says whose it is, becomes that request's refusal."""
        found: list[Message] = []
        while True:
            try:
                for message in self.channel.decode(data):
                    found.append(message)  # noqa: PERF402  what came before an error counts
                return found
            except WireError as error:
                if error.request_id is None:
                    raise
                found.append(Refused(error.request_id, str(error)))
                data = b""

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        if not self.closed.done():
            self.closed.set_result(None)

    def send(self, message: Message) -> None:
        """Queue a message; nothing happens if the other process is gone.

        Raises:
            WireError: it cannot be sent.
        """
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(self.channel.encode(message))

    async def finish(self) -> None:
        """Close once the other process has taken everything."""
        if self.transport is not None:
            self.transport.close()
            await self.closed

    def close(self) -> None:
        """Let go of the socket at once."""
        if self.transport is not None:
            self.transport.abort()
