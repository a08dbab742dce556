"""Requests byte by byte, for what no client library would send."""

import socket
import time
from collections.abc import Callable
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


def metric(url: str, name: str) -> float:
    """The sum of a metric's samples."""
    lines = head(url, "GET /metrics").decode().splitlines()
    found = [float(line.rpartition(" ")[2]) for line in lines if line.startswith((name + "{", name + " "))]
    assert found, name
    return sum(found)


def until(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Ask again until something holds."""
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "it did not come true in time"
