"""Options of the HTTP server, as one frozen value; those of the engine are in `quire/config.py`."""

from dataclasses import dataclass
from pathlib import Path

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
        None,
        "File with a key in each line, or a tenant's name, a key and what the tenant may have: share=2"
        " max_concurrent=8 requests_per_minute=60 tokens_per_minute=100000. # begins a comment.",
    )
    api_server_count: int = option(1, "Processes that speak HTTP at the port, for one engine; at most 64.")
    root_path: str = option("", "Path under which a proxy offers this server, such as /llm.")
    allowed_origins: tuple[str, ...] = option(
        (), "Web origins whose pages may call this server (CORS), such as https://example.org, or *."
    )
    ssl_certfile: str | None = option(None, "Certificate chain (PEM) for HTTPS.")
    ssl_keyfile: str | None = option(None, "Private key (PEM) of the certificate.")
    keep_volatile_lines: bool = option(
        False, "Keep lines at the front of prompts that clients change from call to call (docs/server.md)."
    )
    max_request_bytes: int = option(32 << 20, "Largest body of a request.")
    response_store_bytes: int = option(
        0, "Memory for responses that clients go on with or ask for again, such as 256M; 0 keeps none."
    )
    max_n: int = option(16, "Most outputs a request may ask for with n.")
    max_num_queued_reqs: int = option(4096, "Most requests that may wait ahead of one.")
    max_num_queued_tokens: int = option(4_000_000, "Most prompt tokens that may wait, its own included.")
    max_queue_seconds: float = option(
        30.0, "Longest that a request may be expected to wait; others are told when to come back."
    )
    request_timeout: float = option(600.0, "Seconds until a request that has not ended is refused its rest.")
    drain_timeout: float = option(30.0, "Seconds that requests get to end after SIGTERM.")
    admin_socket: str | None = option(
        None, "Unix socket (a path) for operators: running requests, abort, drain, restart of the engine."
    )
    admin_host: str = option("127.0.0.1", "Address of the port for operators.")
    admin_port: int | None = option(None, "Port for operators, with admin_key_file; 0 takes a free one.")
    admin_key_file: str | None = option(None, "File with the operators' keys, one in each line.")
    otlp_traces_endpoint: str | None = option(
        None, "URL of an OpenTelemetry collector (OTLP over HTTP), such as http://localhost:4318/v1/traces."
    )
    disable_access_log: bool = option(False, "Do not log a line for each request. Prompts are never logged.")

    def __post_init__(self) -> None:
        check(0 <= self.port < 1 << 16, "port", self.port, "from 0 to 65535")
        check(
            not self.root_path or (self.root_path.startswith("/") and not self.root_path.endswith("/")),
            "root_path",
            self.root_path,
            "empty, or a path with a slash at its beginning and none at its end",
        )
        check(
            self.ssl_keyfile is None or self.ssl_certfile is not None,
            "ssl_certfile",
            self.ssl_certfile,
            "given when ssl_keyfile is",
        )
        for name in ("max_request_bytes", "max_n", "max_queue_seconds", "request_timeout"):
            check(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("max_num_queued_reqs", "max_num_queued_tokens"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check(0 < self.api_server_count <= 64, "api_server_count", self.api_server_count, "from 1 to 64")
        store = self.response_store_bytes
        check(store >= 0, "response_store_bytes", store, "at least 0")
        check(
            not store or self.api_server_count == 1,
            "response_store_bytes",
            store,
            "0 with an api_server_count above 1, as its processes would not find each other's responses",
        )
        check(self.drain_timeout >= 0, "drain_timeout", self.drain_timeout, "at least 0")
        port = self.admin_port
        check(port is None or 0 <= port < 1 << 16, "admin_port", port, "from 0 to 65535")
        check(
            port is None or self.admin_key_file is not None,
            "admin_key_file",
            self.admin_key_file,
            "a file with a key, because admin_port is given: every local user can reach a port",
        )
        check(port is None or port != self.port or not port, "admin_port", port, "another one than port")
        traces = self.otlp_traces_endpoint
        check(
            traces is None or traces.startswith(("http://", "https://")),
            "otlp_traces_endpoint",
            traces,
            "a URL that begins with http:// or https://",
        )
        check(all(self.served_model_name), "served_model_name", self.served_model_name, "names, none empty")
        check(all(map(is_key, self.api_key)), "api_key", "***", "printable ASCII without spaces, not empty")


def check(ok: bool, name: str, value: object, rule: str) -> None:
    """Raises ConfigError unless `ok`."""
    if not ok:
        raise ConfigError(f"{name} is {value!r}; it must be {rule}")


def is_key(text: str) -> bool:
    """What can be sent in a header, and be told from its neighbours in a file."""
    return bool(text) and text.isascii() and text.isprintable() and " " not in text


def lines_of_keys(option: str, path: Path) -> list[tuple[int, list[str]]]:
    """The lines of a file of keys that are not empty, as their numbers and words; # begins a comment.

    Raises:
        ConfigError: it cannot be read, or has no such line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{option} is {str(path)!r}, which cannot be read: {error}") from None
    except UnicodeDecodeError:  # which would show what is in it
        raise ConfigError(f"{option} is {str(path)!r}, which is no UTF-8 text") from None
    found = [
        (number, words) for number, line in enumerate(lines, 1) if (words := line.partition("#")[0].split())
    ]
    if not found:
        raise ConfigError(f"{option} is {str(path)!r}; it must hold at least one key")
    return found
