"""An engine group that starts well and dies at the first word after that. Only tests start it."""

import socket

from quire.engine import group
from quire.engine.wire import Channel


def main(sock: socket.socket) -> None:
    channel = Channel(sock)
    parts = group._launch(channel)
    if parts is not None:
        channel.receive(None)
