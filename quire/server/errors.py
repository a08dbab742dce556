"""What clients read when something goes wrong: our own words, never those of an unknown exception."""

import re
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from quire.errors import (
    EngineCrash,
    EngineDead,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
    QuireError,
    RequestCancelled,
)
from quire.log import logger

MAX_MESSAGE_CHARS = 2_000
NAMES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}
MESSAGES_NAMES = {  # Anthropic's
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
MESSAGES = re.compile(r"/v1/messages(/|\Z)")
RETRY_AFTER_S = 2  # a restart takes about that long
NOT_AGAIN = {
    "x-should-retry": "false"
}  # OpenAI's and Anthropic's clients, and Claude Code, try again after 5xx else


class ApiError(Exception):
    """A refusal with its HTTP status. `code` is the status unless OpenAI's clients know a name for it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        **details: Any,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers, self.details = dict(headers or {}), details

    def body(self, path: str = "") -> dict[str, Any]:
        """As the response has it, in the protocol that is spoken at `path`."""
        message = self.message
        if len(message) > MAX_MESSAGE_CHARS:
            message = message[:MAX_MESSAGE_CHARS] + "..."
        spoken = MESSAGES.search(path) is not None
        error = {
            "message": message,
            "type": _messages_name(self.status) if spoken else NAMES.get(self.status, "BadRequestError"),
            "param": self.param,
            "code": self.code or self.status,
            **self.details,
        }
        return {"type": "error", "error": error} if spoken else {"error": error}

    def response(self, path: str = "") -> Response:
        return Response(
            msgspec.json.encode(self.body(path)), self.status, self.headers, media_type="application/json"
        )


def _messages_name(status: int) -> str:
    return MESSAGES_NAMES.get(status, "invalid_request_error" if status < 500 else "api_error")


class ClientGone(Exception):
    """The client closed the connection; nobody reads what comes now."""


def bad_request(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param)


def not_supported(name: str, why: str) -> ApiError:
    return ApiError(501, f"{name}: {why}", param=name, headers=NOT_AGAIN)


def unavailable(message: str) -> ApiError:
    return ApiError(503, message, headers={"Retry-After": str(RETRY_AFTER_S)})


def error_of(error: Exception, request_id: str) -> ApiError:
    """How a client reads an exception; what is not the client's doing is logged, with its request id."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptTooLong):
        return ApiError(
            400,
            str(error),
            param="input_tokens",
            code="context_length_exceeded",
            num_tokens=error.num_tokens,
            max_model_len=error.limit,
        )
    if isinstance(error, InvalidRequest):
        return bad_request(str(error), error.param)
    if isinstance(error, Overloaded):
        own = error.scope == "tenant"
        headers = {"Retry-After": str(error.retry_after_s)}
        code = "rate_limit_exceeded" if own else "server_overloaded"
        return ApiError(429 if own else 503, str(error), code=code, headers=headers, limit=error.reason)
    if isinstance(error, RequestCancelled):
        return ApiError(403, str(error), code="request_cancelled")  # a status that clients do not try again
    if isinstance(error, EngineCrash):
        return ApiError(500, str(error), code="engine_crash", headers=NOT_AGAIN)
    if isinstance(error, TimeoutError):
        return ApiError(504, "the request took longer than this server allows")
    if isinstance(error, EngineDead):
        logger.error("request %s: %s", request_id, error)
        return unavailable("the engine has stopped")
    known = isinstance(error, QuireError)
    logger.error(
        "request %s failed: %s", request_id, error if known else "", exc_info=None if known else error
    )
    return ApiError(
        500, f"the server could not finish this request; its log says why, by the id {request_id}"
    )
