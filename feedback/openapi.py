"""The OpenAPI's parts that FastAPI cannot find: bodies we read ourselves, the shape of errors."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from perennial.feedback.problems import MEDIA_TYPE
from perennial.feedback.replies import Problem

_REF = "#/components/schemas/{model}"


def _problem_response(description: str) -> dict[str, Any]:
    schema = {"$ref": _REF.format(model=Problem.__name__)}
    return {"description": description, "content": {MEDIA_TYPE: {"schema": schema}}}


# Any, here and below: OpenAPI is JSON.
PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": _problem_response("The request cannot be accepted; nothing was stored."),
    "5XX": _problem_response("The server could not answer; retry with the same key."),
}


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """The part of an operation that says it takes `model` as its JSON body."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"requestBody": body}


def replayed(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The response to a request that was stored before."""
    header = {"description": "`true`", "schema": {"type": "string"}}
    words = "It was stored before, by this key or id; the first answer again."
    return {
        200: {
            "model": model,
            "description": words,
            "headers": {"Idempotency-Replayed": header},
        }
    }


def describe(app: FastAPI, *models: type[BaseModel]) -> None:
    """Let the app's OpenAPI define `models` beside those that FastAPI found."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            inputs = [(model, "validation") for model in models]
            _, extra = models_json_schema(inputs, ref_template=_REF)  # type: ignore[arg-type]  # a tuple of literals
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(extra["$defs"])
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # the way FastAPI documents
