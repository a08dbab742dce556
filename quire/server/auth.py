"""Who may ask, and for how much: keys to tenants, checked before anything else looks at a request.

Knows no routes but the probes.

Once there is a key, every path needs one, however it is written; only probes, spelled exactly, do not.
"""

import hashlib
import hmac
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

from starlette.types import ASGIApp, Receive, Scope, Send

from quire.engine.admission import Admission, TenantLimits
from quire.errors import ConfigError
from quire.server.errors import ApiError
from quire.server.settings import ServerSettings, is_key, lines_of_keys

PROBES = ("/livez", "/readyz", "/startupz")  # what orchestrators ask; the answers say only yes or no
REFUSAL = "a valid key is needed; send it as the header Authorization: Bearer KEY, or x-api-key: KEY"


@dataclass(frozen=True, slots=True)
class Holder:
    """A key, whose it is, and what its line in the file says that the tenant may have."""

    tenant: str
    key: str = field(repr=False)
    limits: TenantLimits | None = None


class WithKeys(Protocol):
    """Settings that have keys."""

    @property
    def api_key(self) -> tuple[str, ...]: ...

    @property
    def api_key_file(self) -> str | None: ...


class Keys:
    """Hashes of keys, and whose they are. Keys of one name are one tenant.

    Attributes:
        limits: what tenants may have, of those for whom the file says it.

    Raises:
        ConfigError: two lines give one tenant different limits.
    """

    def __init__(self, holders: Iterable[Holder]):
        self._hashes: list[tuple[bytes, str]] = []
        self.limits: dict[str, TenantLimits] = {}
        for holder in holders:
            self._hashes.append((_hash(holder.key.encode()), holder.tenant))
            if holder.limits is not None:
                known = self.limits.setdefault(holder.tenant, holder.limits)
                if known != holder.limits:
                    raise ConfigError(
                        f"api_key_file gives {holder.tenant!r} two different limits; give them once, or alike"
                    )

    @classmethod
    def of(cls, settings: WithKeys) -> Self:
        """The keys of the command line and of the file.

        Raises:
            ConfigError: the file cannot be read, has no keys, or a line is not `KEY` or `NAME KEY [LIMIT=NUMBER ...]`.
        """
        found = [Holder(f"key-{number}", key) for number, key in enumerate(settings.api_key, 1)]
        if settings.api_key_file is not None:
            found += _read(Path(settings.api_key_file))
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
        own = [value for name, value in scope["headers"] if name == b"x-api-key"]
        if not given and len(own) == 1:
            return self.keys.tenant(own[0].strip())
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        return self.keys.tenant(key.strip()) if scheme.lower() == b"bearer" else None


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
    else:
        error = ApiError(401, REFUSAL, headers={"WWW-Authenticate": "Bearer"})
        await error.response(scope["path"])(scope, receive, send)


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _read(path: Path) -> Sequence[Holder]:
    found = []
    for number, words in lines_of_keys("api_key_file", path):
        name, key, *limits = words if len(words) > 1 else (f"line-{number}", words[0])
        where = f"line {number} of {path}"
        if not is_key(key):  # no message may hold the key
            raise ConfigError(
                f"{where} must be a key, or a tenant's name and a key; keys are printable ASCII"
            )
        found.append(Holder(name, key, _limits(limits, where) if limits else None))
    return found


def _limits(words: Sequence[str], where: str) -> TenantLimits:
    """From words such as `max_concurrent=8`."""
    given: dict[str, float] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in TenantLimits.__dataclass_fields__:
            known = ", ".join(TenantLimits.__dataclass_fields__)
            raise ConfigError(f"{where}: what follows a name and a key must be LIMIT=NUMBER, of {known}")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (0 < value < math.inf) or (name != "share" and not value.is_integer()):
            kind = "a number above 0" if name == "share" else "a whole number from 1"
            raise ConfigError(f"{where}: {name} is {text!r}; it must be {kind}")
        given[name] = value if name == "share" else int(value)
    return TenantLimits(**given)  # type: ignore[arg-type]


def admission_of(settings: ServerSettings) -> Admission:
    """Who may wait for the engine, as the settings and the key file say.

    Raises:
        ConfigError: see `Keys.of`.
    """
    limits: Mapping[str, TenantLimits] = Keys.of(settings).limits
    return Admission(
        limits,
        TenantLimits(),
        settings.max_num_queued_reqs,
        settings.max_num_queued_tokens,
        settings.max_queue_seconds,
    )
