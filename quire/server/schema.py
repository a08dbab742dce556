"""The OpenAPI document: routes read their bodies themselves, so their shapes are put in here."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

REF = "#/components/schemas/{model}"


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """What a route says of its body."""
    schema = {"$ref": REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def document(app: FastAPI, models: list[type[BaseModel]], version: str) -> dict[str, Any]:
    """The whole document."""
    _, shapes = models_json_schema([(model, "validation") for model in models], ref_template=REF)
    found = get_openapi(title="Quire", version=version, routes=app.routes)
    schemas = found.setdefault("components", {}).setdefault("schemas", {})
    schemas |= shapes["$defs"]
    return found
