"""Puts the routes together, and around them keys, request ids and web origins."""

from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from quire import __version__
from quire.engine.service import Service
from quire.errors import ConfigError, QuireError
from quire.server import ops
from quire.server.access import Access
from quire.server.anthropic import messages
from quire.server.auth import Auth, Keys
from quire.server.counts import HttpCounts
from quire.server.errors import ApiError, ClientGone, error_of
from quire.server.frontend import Frontend, json_response
from quire.server.openai import chat, completions, models, responses, tokenize
from quire.server.openai.store import Store
from quire.server.schema import document
from quire.server.settings import ServerSettings
from quire.server.tracing import Traced

CLIENT_CLOSED = 499  # as in other servers' logs; nobody reads it


def create_app(service: Service, settings: ServerSettings) -> ASGIApp:
    """The server as an ASGI application.

    Raises:
        ConfigError: there is no `served_model_name`, or the keys cannot be read.
    """
    return wrap(Frontend(service, settings))


def wrap(front: Frontend) -> ASGIApp:
    """The application over a frontend that somebody else drains."""
    settings = front.settings
    if not settings.served_model_name:
        raise ConfigError("served_model_name is empty; give the names that requests may use")
    api = _rooted(_api(front), settings.root_path)
    if front.tracer is not None:
        api = Traced(api, front.tracer)
    app: ASGIApp = Auth(api, Keys.of(settings), root_path=settings.root_path)
    if settings.allowed_origins:  # outside, because browsers ask without a key whether they may
        app = CORSMiddleware(
            app,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    counts = HttpCounts(front.service.metrics.families)
    return Access(app, counts, log=not settings.disable_access_log)


def _rooted(app: ASGIApp, root_path: str) -> ASGIApp:
    """Routes are found under `root_path`, and without it, for a proxy that cuts it off."""

    async def rooted(scope: Scope, receive: Receive, send: Send) -> None:
        scope["root_path"] = root_path  # in place: who counts outside reads from the scope which route it was
        await app(scope, receive, send)

    return rooted if root_path else app


def _api(front: Frontend) -> FastAPI:
    # A redirect to a path with or without a slash would be written from the Host header, which anybody can set.
    api = FastAPI(
        title="Quire",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    api.state.frontend = front
    api.state.responses = Store(front.settings.response_store_bytes)
    for part in (completions, chat, responses, messages, models, tokenize, ops):
        api.include_router(part.router)
    shape: dict[str, Any] = document(api, __version__, front.settings.root_path)

    @api.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return json_response(shape)

    for kind in (ApiError, QuireError, TimeoutError, Exception):
        api.add_exception_handler(kind, _explain)
    api.add_exception_handler(HTTPException, _no_route)
    api.add_exception_handler(ClientGone, _gone)
    return api


async def _explain(http: HttpRequest, error: Exception) -> Response:
    return error_of(error, http.scope["request_id"]).response(http.url.path)


async def _no_route(http: HttpRequest, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    wording = {404: "there is no such path", 405: "this path does not take this method"}
    headers = error.headers if isinstance(error, HTTPException) else None  # Allow, with 405
    return ApiError(status, wording.get(status, "the request cannot be served"), headers=headers).response(
        http.url.path
    )


async def _gone(_: HttpRequest, __: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED)
