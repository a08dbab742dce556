"""A request id for every request; a line in the log and a count when it has ended. Never what was asked or answered."""

import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.log import logger
from quire.server.counts import HttpCounts
from quire.server.errors import error_of

REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
QUIET = {  # asked every few seconds
    *("/livez", "/readyz", "/startupz", "/health", "/ping", "/metrics", "/load", "/version")
}


class Access:
    """Puts `request_id` into the scope and the header X-Request-Id into the response, and counts."""

    def __init__(self, app: ASGIApp, counts: HttpCounts, *, log: bool):
        self.app, self.counts, self.log = app, counts, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = scope["request_id"] = _request_id(scope)
        begin, status = time.monotonic(), 0

        async def record(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, record)
        except Exception as error:
            if not status:  # else the application has answered, logged it, and raised it again
                await error_of(error, request_id).response(scope["path"])(scope, receive, record)
        finally:
            path, seconds, route = scope["path"][:200], time.monotonic() - begin, scope.get("route")
            quiet = (path if route is None else route.path_format) in QUIET  # under a proxy's path too
            if not quiet:
                self.counts.observe(scope, status, seconds)
            if self.log and not quiet:
                shown = path.encode("ascii", "backslashreplace").decode()  # nothing that a terminal obeys
                shown = "".join(c if c.isprintable() else "?" for c in shown)
                tenant = f" {scope['tenant']}" if scope.get("tenant") else ""
                logger.info(
                    "%s %s %s in %.3f s, %s%s",
                    scope["method"],
                    shown,
                    status or "gone",
                    seconds,
                    request_id,
                    tenant,
                )


def _request_id(scope: Scope) -> str:
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(given) == 1 and REQUEST_ID.fullmatch(given[0]):
        return str(given[0].decode())
    return uuid.uuid4().hex
