"""Requests byte by byte, for what no client library would send."""

import socket
from urllib.parse import urlsplit


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=30)


def head(url: str, line: str, *headers: str) -> bytes:
    """The response to one request without a body."""
    with connect(url) as connection:
        lines = (f"{line} HTTP/1.1", "Host: test", "Connection: close", *headers, "", "")
        connection.sendall("\r\n".join(lines).encode("latin-1"))
        return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    found = b""
    try:
        while piece := connection.recv(65536):
            found += piece
    except ConnectionResetError:  # the server closed while more was on its way
        pass
    return found


def status(response: bytes) -> int:
    return int(response.split(b" ", 2)[1]) if response else 0
