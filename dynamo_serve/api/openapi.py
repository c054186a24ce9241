"""The OpenAPI document: bodies are parsed by hand, so their schemas are added by hand too."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from dynamo_serve.api import parse

REFERENCE = "#/components/schemas/{model}"

ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "description": "What is wrong, for people."},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The field at fault."},
                "code": {"type": "string", "description": "What is wrong, for programs."},
            },
        }
    },
}


def takes(*models: type[BaseModel], told: dict[str, Any] | None = None) -> dict[str, Any]:
    """The part of a route's description that says which JSON body it takes: one of these. `told`
    is an example of what it answers."""
    kinds = [{"$ref": REFERENCE.format(model=model.__name__)} for model in models]
    schema: dict[str, Any] = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
    error = {"application/json": {"schema": {"$ref": REFERENCE.format(model="Error")}}}
    answers: dict[str, Any] = {"4XX": {"description": "The request is at fault.", "content": error}}
    if told is not None:
        answers["200"] = {"content": {"application/json": {"example": told}}}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": answers,
    }


def document(app: FastAPI) -> dict[str, Any]:
    """The document of `app`, with the schemas of the request bodies."""
    whole = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    _, definitions = models_json_schema(
        [(model, "validation") for model in parse.KNOWN], ref_template=REFERENCE
    )
    schemas = whole.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(definitions["$defs"])
    schemas["Error"] = ERROR_SCHEMA
    for model, known in parse.KNOWN.items():
        for name, entry in known.items():
            schemas[model.__name__]["properties"][name] = {
                "description": f"{entry.status}: {entry.why}"
            }
    return whole
