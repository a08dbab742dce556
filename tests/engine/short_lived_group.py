"""An engine group that starts well and dies at the first word after that. Only tests start it."""

import socket

from quire.engine import group
from quire.engine.wire import Channel


def main(sock: socket.socket) -> None:
    channel = Channel(sock)
    launched = group._launch(channel, None)
    if launched is not None:
        channel.receive(None)
