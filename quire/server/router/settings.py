"""Options of `quire router`, as one frozen value."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from quire.config import option
from quire.errors import ConfigError
from quire.server.settings import check, is_key


@dataclass(frozen=True, kw_only=True)
class RouterSettings:
    """Which replicas there are, and where to listen. Names are those of `quire serve` where the meaning is the same.

    Raises:
        ConfigError: a value is outside its range; the message names the range.
    """

    backend: tuple[str, ...] = option((), "URLs of the replicas, such as http://127.0.0.1:8001.")
    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 is every network this machine is in.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.")
    api_key: tuple[str, ...] = option(
        (),
        "Keys of which a request must bring one; replicas see it too. Others can see a command's arguments.",
    )
    api_key_file: str | None = option(None, "File with a key in each line, as that of quire serve.")
    backend_key_file: str | None = option(
        None,
        "File with the key by which replicas are asked once a second how busy they are, if they need one.",
    )
    ssl_certfile: str | None = option(None, "Certificate chain (PEM) for HTTPS.")
    ssl_keyfile: str | None = option(None, "Private key (PEM) of the certificate.")
    max_request_bytes: int = option(32 << 20, "Largest body of a request.")
    max_num_reqs: int = option(4096, "Most requests at a time.")
    max_queue_seconds: float = option(
        30.0, "Longest that a request may be expected to wait; others are told when to come back."
    )
    cache_tokens: int = option(2_000_000, "Tokens that a replica is taken to cache unless it says so itself.")
    request_timeout: float = option(600.0, "Seconds until a request that has not ended is refused its rest.")
    drain_timeout: float = option(30.0, "Seconds that requests get to end after SIGTERM.")
    disable_access_log: bool = option(False, "Do not log a line for each request. Prompts are never logged.")

    def __post_init__(self) -> None:
        check(0 <= self.port < 1 << 16, "port", self.port, "from 0 to 65535")
        check(0 < len(self.backend) <= 256, "backend", self.backend, "the URLs of 1 to 256 replicas")
        for url in self.backend:
            check(_is_base(url), "backend", url, "like http://127.0.0.1:8001, without a user or a query")
        bases = [url.rstrip("/") for url in self.backend]
        check(len(set(bases)) == len(bases), "backend", self.backend, "each replica once")
        check(
            self.ssl_keyfile is None or self.ssl_certfile is not None,
            "ssl_certfile",
            self.ssl_certfile,
            "given when ssl_keyfile is",
        )
        for name in ("max_request_bytes", "max_queue_seconds", "request_timeout"):
            check(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("max_num_reqs", "cache_tokens"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check(self.drain_timeout >= 0, "drain_timeout", self.drain_timeout, "at least 0")
        check(all(map(is_key, self.api_key)), "api_key", "***", "printable ASCII without spaces, not empty")


def _is_base(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"backend is {url!r}, which is no URL: {error}") from None
    bare = not (parts.query or parts.fragment or "@" in parts.netloc)
    return bool(host) and parts.scheme in ("http", "https") and bare
