"""GET /v1/models: what this server serves, under each of its names."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from quire.server.frontend import Frontend, frontend_of, json_response

router = APIRouter()


@router.get("/v1/models")
async def list_models(http: HttpRequest) -> Response:
    """Every name that a request may give as `model`."""
    front = frontend_of(http)
    front.check_ready()
    return json_response({"object": "list", "data": [_card(front, name) for name in front.names]})


@router.get("/v1/models/{name:path}")
async def retrieve_model(http: HttpRequest, name: str) -> Response:
    """One of them; without a name all of them."""
    if not name:
        return await list_models(http)
    front = frontend_of(http)
    front.check_ready()
    return json_response(_card(front, front.check_model(name)))


def _card(front: Frontend, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": front.created_s,
        "owned_by": "quire",
        "root": front.names[0],
        "parent": None,
        "max_model_len": front.service.inputs.max_length,
        "permission": [],
    }
