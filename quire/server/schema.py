"""The OpenAPI document: routes read and write their bodies themselves, so the shapes are put in here."""

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from quire.server.anthropic import answers as messages_answers
from quire.server.anthropic import protocol as messages_protocol
from quire.server.errors import MESSAGES
from quire.server.openai import answers, protocol
from quire.server.openai.requests import ResponsesRequest

RESPONSE = "/v1/responses/{response_id}"
REF = "#/components/schemas/{model}"
ABOUT = "OpenAI's and Anthropic's APIs over one model, with vLLM's extra fields, and what operators ask of a server."
TEXT = "text/plain"
REQUESTS: list[type[BaseModel]] = [
    protocol.CompletionRequest,
    protocol.ChatRequest,
    ResponsesRequest,
    messages_protocol.MessagesRequest,
    messages_protocol.CountTokensRequest,
    protocol.TokenizeRequest,
    protocol.DetokenizeRequest,
]
# What a route answers with 200; a second one is an event of its stream.
ANSWERS: dict[str, tuple[type[BaseModel], ...]] = {
    "/v1/completions": (answers.CompletionAnswer, answers.CompletionChunk),
    "/v1/chat/completions": (answers.ChatAnswer, answers.ChatChunk),
    "/v1/responses": (answers.ResponseAnswer, answers.ResponseEvent),
    RESPONSE: (answers.ResponseAnswer,),
    f"delete {RESPONSE}": (answers.DeletedResponse,),
    f"{RESPONSE}/cancel": (answers.ResponseAnswer,),
    f"{RESPONSE}/input_items": (answers.ResponseItems,),
    "/v1/messages": (messages_answers.Message, messages_answers.MessagesEvent),
    "/v1/messages/count_tokens": (messages_answers.TokenCount,),
    "/v1/models": (answers.Models,),
    "/v1/models/{name}": (answers.Model,),
    "/tokenize": (answers.TokensAnswer,),
    "/detokenize": (answers.TextAnswer,),
    "/version": (answers.Version,),
    "/load": (answers.Load,),
}
REFUSALS = {
    400: "A value is wrong; the error names it, the limit and the way out.",
    401: "No valid key.",
    404: "There is no such model, or response.",
    408: "The body did not arrive.",
    413: "The body is too large.",
    429: "More than this key may ask for now; Retry-After says when.",
    500: "The engine could not finish it.",
    501: "This server cannot do it yet.",
    503: "The engine starts, the server stops, or too much waits; Retry-After says when.",
    504: "It took longer than allowed.",
}
WRONG = {  # an example
    "error": {
        "message": "temperature is 7; it must be a number from 0 to 2",
        "type": "BadRequestError",
        "param": "temperature",
        "code": 400,
    }
}
HEADERS = (
    (
        "X-Request-Id",
        "string",
        "Names the call in the log and in the answer; letters, digits and ._:-, up to 128.",
    ),
    ("X-Vllm-Priority", "integer", "As the field priority, before which it goes."),
    ("X-Request-Timeout", "number", "Seconds until the call is given up, waiting included."),
)
ASKED = (401, 503)  # what a route without a body refuses
PROBES = {"/livez": (), "/readyz": (503,), "/startupz": (503,)}
EMPTY = ("/health", "/ping")  # a status, and nothing to read


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """What a route says of its body."""
    schema = {"$ref": REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def document(app: FastAPI, version: str, root_path: str = "") -> dict[str, Any]:
    """The whole document, of a server that is offered under `root_path`."""
    shown: list[type[BaseModel]] = [
        *REQUESTS,
        *(shape for shapes in ANSWERS.values() for shape in shapes),
        answers.ErrorAnswer,
        messages_answers.MessagesError,
    ]
    kinds: list[tuple[type[BaseModel], Literal["validation"]]] = [(model, "validation") for model in shown]
    _, shapes = models_json_schema(kinds, ref_template=REF)
    found = get_openapi(title="Quire", version=version, description=ABOUT, routes=app.routes)
    found["servers"] = [{"url": root_path or "/"}]
    parts = found.setdefault("components", {})
    parts["schemas"] = shapes["$defs"]
    parts["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "Where the server has keys."}
    }
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            named = f"{method} {path}" if f"{method} {path}" in ANSWERS else path
            operation["responses"] = _responses(named, generates="requestBody" in operation)
            if len(ANSWERS.get(path, ())) > 1:
                operation["parameters"] = [_header(*header) for header in HEADERS]
            if path not in PROBES:
                operation["security"] = [{"key": []}, {}]
    return found


def _responses(path: str, *, generates: bool) -> dict[str, Any]:
    refusals: tuple[int, ...] = tuple(REFUSALS) if generates else PROBES.get(path, ASKED)
    if path == "/v1/models/{name}":
        refusals = (*refusals, 404)
    if RESPONSE in path:
        refusals = (400, 401, 404, 501)
    plain = path in PROBES
    found = {
        str(status): _refusal(path, status, plain=plain, empty=path in EMPTY) for status in sorted(refusals)
    }
    return {"200": _success(path), **found}


def _success(path: str) -> dict[str, Any]:
    if path in EMPTY:
        return {"description": "Requests are taken."}
    if path not in ANSWERS:
        return {"description": "As text.", "content": {TEXT: {"schema": {"type": "string"}}}}
    whole, *events = ANSWERS[path]
    content: dict[str, Any] = {"application/json": {"schema": _ref(whole)}}
    if events:
        content["text/event-stream"] = {"schema": _event(path, events[0])}
    return {
        "description": "The answer." if len(content) == 1 else "The answer; a stream's event.",
        "content": content,
    }


def _event(path: str, shape: type[BaseModel]) -> dict[str, Any]:
    """An event of a stream: its type, where it has one, and what it says, in JSON."""
    error = messages_answers.MessagesError if MESSAGES.search(path) else answers.ErrorAnswer
    content = {"anyOf": [_ref(shape), _ref(error)]}
    said: list[dict[str, Any]] = [{"contentMediaType": "application/json", "contentSchema": content}]
    fields: dict[str, Any] = {"data": {"type": "string", "anyOf": said}}
    if "type" in shape.model_fields:
        fields["event"] = {"type": "string"}
    else:
        said.insert(0, {"const": "[DONE]"})
    return {"type": "object", "required": list(fields), "properties": fields}


def _header(name: str, kind: str, about: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": about, "schema": {"type": kind}}


def _refusal(path: str, status: int, *, plain: bool, empty: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"description": REFUSALS[status]}
    if status == 503 and (plain or empty):
        return found | ({"content": {TEXT: {"schema": {"type": "string"}}}} if plain else {})
    spoken = MESSAGES.search(path) is not None
    shape: type[BaseModel] = messages_answers.MessagesError if spoken else answers.ErrorAnswer
    found["content"] = {"application/json": {"schema": _ref(shape)}}
    if status == 400 and not spoken:
        found["content"]["application/json"]["example"] = WRONG
    if status in (429, 503):
        found["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    return found


def _ref(shape: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REF.format(model=shape.__name__)}
