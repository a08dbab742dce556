"""What operators may do, on a listener of its own: a Unix socket, or a port with a key. Never part of the public one.

It runs beside the keeper of the requests, in the main process, and knows no prompt and no output.
"""

import asyncio
import dataclasses
import hashlib
import hmac
import logging
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from quire import __version__
from quire.engine.journal import Entry
from quire.engine.keeper import Keepers
from quire.errors import ConfigError, QuireError, RequestCancelled
from quire.log import LEVELS, logger
from quire.server.errors import ApiError, error_of
from quire.server.frontend import json_response
from quire.server.http import server_of
from quire.server.limits import read_body
from quire.server.settings import ServerSettings, is_key, lines_of_keys

MAX_BODY_BYTES = 4 << 10
BACKLOG = 16
SECRETS = {"api_key"}
GOODBYE_S = 1  # for answers that are on their way when the server stops


class Strict(BaseModel):
    """A body without unknown fields: a wrong name must not look as if it had worked."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AbortBody(Strict):
    """Which request; the id that its answer has, or that /requests shows."""

    request_id: Annotated[str, Field(min_length=1, max_length=256)]


class LevelBody(Strict):
    """How much is logged from now on."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"]


class Control:
    """What the paths act on.

    Args:
        keeper: has the requests and the engine.
        settings: of the server.
        stop: begins to drain, as the first SIGTERM does; False if the server stops already.
    """

    def __init__(self, keeper: Keepers, settings: ServerSettings, stop: Callable[[], bool]):
        self.keeper, self.settings, self.stop = keeper, settings, stop
        self.begin_s = time.monotonic()

    def requests(self) -> Iterator[dict[str, Any]]:
        """Every open request, the oldest first."""
        now = self.keeper.clock()
        for name, entry, is_running in self.keeper.entries():
            yield {
                "id": entry.submission.label or name,
                "tenant": entry.submission.tenant,
                "state": _state(entry, is_running),
                "prompt_tokens": len(entry.submission.prompt_token_ids),
                "tokens": sum(len(tokens) for tokens in entry.outputs if tokens),
                "age_s": round(now - entry.added_s, 3),
                "priority": entry.submission.priority,
                "replays": max(entry.num_sent - 1, 0),
            }

    def info(self) -> dict[str, Any]:
        """The server as it is; no keys."""
        settings = {k: v for k, v in dataclasses.asdict(self.settings).items() if k not in SECRETS}
        return {
            "version": __version__,
            "status": self.keeper.status.value,
            "uptime_s": round(time.monotonic() - self.begin_s, 3),
            "pid": os.getpid(),
            "engine_pids": self.keeper.pids,
            "num_requests": sum(1 for _ in self.keeper.entries()),
            "num_restarts": self.keeper.num_restarts,
            "num_replays": self.keeper.num_replayed,
            "server_options": settings,
            "engine_options": dict(self.keeper.options),
        }


def _state(entry: Entry, is_running: bool) -> str:
    """running: in the latest step; queued: the engine has it; waiting: it does not, or there is none."""
    if not entry.sent:
        return "waiting"
    return "running" if is_running else "queued"


def admin_app(control: Control) -> ASGIApp:
    """The paths as an ASGI application, for whoever may reach it."""
    keeper = control.keeper

    async def requests(http: HttpRequest) -> Any:
        return {"requests": list(control.requests())}

    async def abort(http: HttpRequest) -> Any:
        name = (await read_body(http, AbortBody, max_bytes=MAX_BODY_BYTES)).request_id
        number = keeper.cancel(name, RequestCancelled("this request was ended by whoever runs the server"))
        if not number:
            raise ApiError(404, f"no open request has the id {name!r}", param="request_id")
        return {"aborted": number}

    async def reset_prefix_cache(http: HttpRequest) -> Any:
        keeper.reset_prefix_cache()
        return {"success": True}

    async def drain(http: HttpRequest) -> Any:
        return {"draining": True, "already": not control.stop()}

    async def restart_engine(http: HttpRequest) -> Any:
        if not keeper.replace():
            raise ApiError(409, f"the engine is {keeper.status.value}; it can be replaced when it is ready")
        return {"restarting": True}

    async def server_info(http: HttpRequest) -> Any:
        return control.info()

    async def get_level(http: HttpRequest) -> Any:
        numbers = logging.getLevelNamesMapping()
        return {"level": next(level for level in LEVELS if logger.isEnabledFor(numbers[level]))}

    async def set_level(http: HttpRequest) -> Any:
        logger.setLevel((await read_body(http, LevelBody, max_bytes=MAX_BODY_BYTES)).level)
        return await get_level(http)

    reads = {"requests": requests, "server_info": server_info, "log_level": get_level}
    acts = {
        "abort": abort,
        "reset_prefix_cache": reset_prefix_cache,
        "drain": drain,
        "restart_engine": restart_engine,
        "log_level": set_level,
    }
    routes = [Route(f"/{name}", _answering(handle), methods=["GET"]) for name, handle in reads.items()]
    routes += [
        Route(f"/{name}", _answering(handle, log=True), methods=["POST"]) for name, handle in acts.items()
    ]
    explained: dict[Any, Any] = dict.fromkeys((ApiError, QuireError, Exception), _explain)
    return Starlette(routes=routes, exception_handlers={**explained, HTTPException: _no_route})


class KeyHolders:
    """Lets those through who bring one of the keys."""

    def __init__(self, app: ASGIApp, keys: list[str]):
        self.app, self.hashes = app, [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        digest = hashlib.sha256(key.strip()).digest()
        known = [hmac.compare_digest(digest, each) for each in self.hashes]
        if scheme.lower() == b"bearer" and any(known):
            await self.app(scope, receive, send)
        else:
            error = ApiError(401, "an operator's key is needed: the header Authorization: Bearer KEY")
            await error.response()(scope, receive, send)


@asynccontextmanager
async def administered(control: Control) -> AsyncIterator[None]:
    """Serve the paths while the block runs, if the settings have a socket or a port for them.

    Raises:
        ConfigError: the socket, the port or the key file cannot be used.
    """
    settings = control.settings
    app = admin_app(control)
    if settings.admin_key_file is not None:
        app = KeyHolders(app, read_keys(Path(settings.admin_key_file)))
    listeners: list[socket.socket] = []
    path: Path | None = None
    try:
        if settings.admin_socket is not None:
            listeners.append(listen_at_path(Path(settings.admin_socket)))
            path = Path(settings.admin_socket)
        if settings.admin_port is not None:
            listeners.append(listen_at_port(settings.admin_host, settings.admin_port))
            logger.info("operators: http://%s:%d", settings.admin_host, listeners[-1].getsockname()[1])
        async with _served(app, listeners):
            yield
    finally:
        for listener in listeners:
            listener.close()
        if path is not None:
            path.unlink(missing_ok=True)


def listen_at_path(path: Path) -> socket.socket:
    """A Unix socket that only this user can open. One that nobody listens at any more is replaced.

    Raises:
        ConfigError: somebody listens there, something else is there, or there can be no socket.
    """
    where = f"admin_socket is {str(path)!r}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise ConfigError(f"{where}, and there is a file that is no socket; it must be a free path")
            if _answers(path):
                raise ConfigError(f"{where}, and another server listens there; it must be a free path")
            path.unlink()
        listener.bind(str(path))
        path.chmod(0o600)  # nobody can connect before it listens
        listener.listen(BACKLOG)
    except OSError as error:  # the path is too long, for example
        listener.close()
        raise ConfigError(f"{where}, and no socket can be there: {error.strerror or error}") from None
    except BaseException:
        listener.close()
        raise
    return listener


def listen_at_port(host: str, port: int) -> socket.socket:
    """Raises ConfigError: the port is in use, or the address is not this machine's."""
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at admin_host {host!r} and admin_port {port}: {error.strerror}"
        ) from None


def read_keys(path: Path) -> list[str]:
    """The keys in a file: one in each line, # begins a comment.

    Raises:
        ConfigError: it cannot be read, has no key, or a line is none.
    """
    lines = lines_of_keys("admin_key_file", path)
    for number, words in lines:
        if len(words) != 1 or not is_key(words[0]):  # the message must not hold it
            raise ConfigError(f"line {number} of {path} must be a key: printable ASCII without spaces")
    return [words[0] for _, words in lines]


@asynccontextmanager
async def _served(app: ASGIApp, listeners: list[socket.socket]) -> AsyncIterator[None]:
    if not listeners:
        yield
        return
    server = server_of(app, goodbye_s=GOODBYE_S)
    serving = asyncio.create_task(server.serve(sockets=listeners))
    try:
        yield
    finally:
        server.should_exit = True
        await serving


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
    return True


def _answering(
    handle: Callable[[HttpRequest], Awaitable[Any]], *, log: bool = False
) -> Callable[[HttpRequest], Awaitable[Response]]:
    async def answer(http: HttpRequest) -> Response:
        found = await handle(http)
        if log:
            logger.info("operator: %s", http.url.path)
        return json_response(found)

    return answer


async def _explain(_: HttpRequest, error: Exception) -> Response:
    return error_of(error, "of an operator").response()


async def _no_route(_: HttpRequest, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    return ApiError(status, "there is no such path, or it does not take this method").response()
