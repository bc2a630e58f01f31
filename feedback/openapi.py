"""The OpenAPI's parts that FastAPI cannot find: the routes that write, the shape of errors."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from perennial.feedback.bodies import KEY_PATTERN, json_schemas
from perennial.feedback.problems import MEDIA_TYPE
from perennial.feedback.replies import (
    FeedbackBatchReply,
    FeedbackCreated,
    InteractionBatchReply,
    InteractionCreated,
    Problem,
)

_REF = "#/components/schemas/{model}"


def _problem_response(description: str) -> dict[str, Any]:
    schema = {"$ref": _REF.format(model=Problem.__name__)}
    return {"description": description, "content": {MEDIA_TYPE: {"schema": schema}}}


# Any, here and below: OpenAPI is JSON.
PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": _problem_response("The request cannot be accepted; nothing was stored."),
    "5XX": _problem_response("The server could not answer; retry with the same key."),
}


def describe(app: FastAPI) -> None:
    """Let the app's OpenAPI tell of the routes that write, which FastAPI does not know."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(_schemas())
            for path, operation in _WRITES.items():
                document["paths"].setdefault(path, {})["post"] = _operation(path, operation)
            document["paths"]["/v1/traces"] = {"post": _TRACES}
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # the way FastAPI documents


@dataclass(frozen=True, kw_only=True, slots=True)
class _Write:
    """What the document says of a route that writes."""

    summary: str
    takes: str
    gives: type[BaseModel]
    is_batch: bool = False


_WRITES: Mapping[str, _Write] = {
    "/v1/interactions": _Write(
        summary="Store one answered request, once by its id and its key.",
        takes="InteractionBody",
        gives=InteractionCreated,
    ),
    "/v1/interactions/batch": _Write(
        summary="Store up to 1,000 interactions; each item has a status of its own.",
        takes="InteractionBatchBody",
        gives=InteractionBatchReply,
        is_batch=True,
    ),
    "/v1/feedback": _Write(
        summary="Store one signal, once by its key; an unknown target makes it `pending`.",
        takes="FeedbackBody",
        gives=FeedbackCreated,
    ),
    "/v1/feedback/batch": _Write(
        summary="Store up to 1,000 signals; each item has a status of its own.",
        takes="FeedbackBatchBody",
        gives=FeedbackBatchReply,
        is_batch=True,
    ),
}


def _schemas() -> dict[str, Any]:
    replies = [(write.gives, "serialization") for write in _WRITES.values()]
    models = [*replies, (Problem, "serialization")]
    _, answers = models_json_schema(models, ref_template=_REF)  # type: ignore[arg-type]  # a tuple of literals
    bodies = json_schemas(_REF.replace("{model}", "{name}"))
    for body in bodies.values():
        body["description"] = inspect.cleandoc(body.get("description", ""))
    return {**answers["$defs"], **bodies}


def _operation(path: str, write: _Write) -> dict[str, Any]:
    created = _json_response("It is on disk.", write.gives)
    again = _json_response(
        "It was stored before, by this key or id: the first answer.", write.gives
    )
    again["headers"] = {"Idempotency-Replayed": {"schema": {"type": "string"}}}
    per_item = _json_response("One reply for each item, in their order.", write.gives)
    return {
        "operationId": "post_" + path.removeprefix("/v1/").replace("/", "_"),
        "summary": write.summary,
        "security": [{"HTTPBearer": []}],
        "parameters": [_KEY_PARAMETER],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": _REF.format(model=write.takes)}}},
        },
        "responses": {
            **({"200": per_item} if write.is_batch else {"201": created, "200": again}),
            **PROBLEM_RESPONSES,
        },
    }


def _json_response(description: str, model: type[BaseModel]) -> dict[str, Any]:
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


_KEY_PARAMETER = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Makes a retry safe: the same key and body give the first answer again.",
    "schema": {"type": "string", "pattern": KEY_PATTERN},
}

_TRACES = {
    "operationId": "post_traces",
    "summary": "Take an OTLP ExportTraceServiceRequest; spans of answers become interactions.",
    "security": [{"HTTPBearer": []}],
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"type": "object"}}},
        "description": "Also as `application/x-protobuf`; gzip is taken.",
    },
    "responses": {
        "200": {"description": "Stored, but for what `partial_success` counts."},
        **PROBLEM_RESPONSES,
    },
}
