"""Options of the HTTP server, as one frozen value; those of the engine are in `quire/config.py`."""

from dataclasses import dataclass

from quire.config import option
from quire.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Where and how to serve. Names follow vLLM's where the meaning is the same.

    Raises:
        ConfigError: a value is outside its range; the message names the range.
    """

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 is every network this machine is in.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.")
    served_model_name: tuple[str, ...] = option(
        (), "Names that requests may give as model; the first is in the answers. Without any: MODEL as given."
    )
    api_key: tuple[str, ...] = option(
        (), "Keys of which a request must bring one; each is a tenant. Others can see a command's arguments."
    )
    api_key_file: str | None = option(
        None, "File with a key in each line, or a tenant's name and a key; # begins a comment."
    )
    root_path: str = option("", "Path under which a proxy offers this server, such as /llm.")
    allowed_origins: tuple[str, ...] = option(
        (), "Web origins whose pages may call this server (CORS), such as https://example.org, or *."
    )
    ssl_certfile: str | None = option(None, "Certificate chain (PEM) for HTTPS.")
    ssl_keyfile: str | None = option(None, "Private key (PEM) of the certificate.")
    max_request_bytes: int = option(32 << 20, "Largest body of a request.")
    max_n: int = option(16, "Most outputs a request may ask for with n.")
    request_timeout: float = option(600.0, "Seconds until a request that has not ended is refused its rest.")
    drain_timeout: float = option(30.0, "Seconds that requests get to end after SIGTERM.")
    disable_access_log: bool = option(False, "Do not log a line for each request. Prompts are never logged.")

    def __post_init__(self) -> None:
        _check(0 <= self.port < 1 << 16, "port", self.port, "from 0 to 65535")
        _check(
            not self.root_path or (self.root_path.startswith("/") and not self.root_path.endswith("/")),
            "root_path",
            self.root_path,
            "empty, or a path with a slash at its beginning and none at its end",
        )
        _check(
            self.ssl_keyfile is None or self.ssl_certfile is not None,
            "ssl_certfile",
            self.ssl_certfile,
            "given when ssl_keyfile is",
        )
        for name in ("max_request_bytes", "max_n", "request_timeout"):
            _check(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        _check(self.drain_timeout >= 0, "drain_timeout", self.drain_timeout, "at least 0")
        _check(all(self.served_model_name), "served_model_name", self.served_model_name, "names, none empty")
        _check(all(map(is_key, self.api_key)), "api_key", "***", "printable ASCII without spaces, not empty")


def _check(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        raise ConfigError(f"{name} is {value!r}; it must be {rule}")


def is_key(text: str) -> bool:
    """What can be sent in a header, and be told from its neighbours in a file."""
    return bool(text) and text.isascii() and text.isprintable() and " " not in text
