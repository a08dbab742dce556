"""Who may ask: keys to tenants, checked before anything else looks at a request. Knows no routes but the probes.

Once there is a key, every path needs one, however it is written; only probes, spelled exactly, do not.
"""

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from starlette.types import ASGIApp, Receive, Scope, Send

from quire.errors import ConfigError
from quire.server.errors import ApiError
from quire.server.settings import ServerSettings, is_key

PROBES = ("/livez", "/readyz", "/startupz")  # what orchestrators ask; the answers say only yes or no
REFUSAL = "a valid key is needed; send it as the header Authorization: Bearer KEY"


class Keys:
    """Hashes of keys, and whose they are. Keys of one name are one tenant."""

    def __init__(self, tenants: Iterable[tuple[str, str]]):
        """`tenants`: (name, key)."""
        self._hashes = [(_hash(key.encode()), name) for name, key in tenants]

    @classmethod
    def of(cls, settings: ServerSettings) -> Self:
        """The keys of the command line and of the file.

        Raises:
            ConfigError: the file cannot be read, or a line is not `KEY` or `NAME KEY`.
        """
        found = [(f"key-{number}", key) for number, key in enumerate(settings.api_key, 1)]
        if settings.api_key_file is not None:
            found += _read(Path(settings.api_key_file))
            if not found:
                raise ConfigError(f"api_key_file is {settings.api_key_file!r}; it must hold at least one key")
        return cls(found)

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def tenant(self, key: bytes) -> str | None:
        """The tenant of a key, in a time that does not depend on the key."""
        given, found = _hash(key), None
        for known, name in self._hashes:
            if hmac.compare_digest(given, known):
                found = name
        return found


class Auth:
    """Lets requests with a key through, as their tenant's."""

    def __init__(self, app: ASGIApp, keys: Keys, *, root_path: str = ""):
        self.app, self.keys = app, keys
        self.open = {(prefix + path).encode() for prefix in ("", root_path) for path in PROBES}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tenant = self._tenant(scope)
        if tenant is None:
            await _refuse(scope, receive, send)
        else:
            scope["tenant"] = tenant
            await self.app(scope, receive, send)

    def _tenant(self, scope: Scope) -> str | None:
        if not self.keys:
            return ""
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and scope["raw_path"] in self.open:
            return ""
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        return self.keys.tenant(key.strip()) if scheme.lower() == b"bearer" else None


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
    else:
        error = ApiError(401, REFUSAL, headers={"WWW-Authenticate": "Bearer"})
        await error.response()(scope, receive, send)


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _read(path: Path) -> Sequence[tuple[str, str]]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) > 2 or not is_key(words[-1]):  # the message must not hold the key
            raise ConfigError(f"line {number} of {path} must be a key, or a tenant's name and a key")
        found.append((words[0] if len(words) == 2 else f"line-{number}", words[-1]))
    return found
