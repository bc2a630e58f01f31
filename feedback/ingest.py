"""The routes that write: interactions and feedback, one or many at a time.

Plain Starlette and msgspec: at thousands of requests a second the framework would cost more than
the disk. An answer is sent when its rows are on disk.
"""

import re
from collections.abc import Awaitable, Callable, Mapping
from hashlib import sha256

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from perennial.feedback.bodies import KEY_PATTERN, BatchBody
from perennial.feedback.intake import (
    FEEDBACK,
    INTERACTION,
    BodyT,
    Intake,
    Kind,
    admit_rows,
    admitted,
    check_items,
    check_one,
    store,
    subject_by_row,
)
from perennial.feedback.limits import MAX_BATCH_BYTES, MAX_BODY_BYTES, parse_json, read_json
from perennial.feedback.problems import problem_of
from perennial.feedback.store import Outcome, Stored
from perennial.infra.errors import InputError

Handler = Callable[[Request], Awaitable[Response]]

_BATCH = msgspec.json.Decoder(BatchBody)


def ingest_routes(intake: Intake) -> list[Route]:
    """The routes, for an app that makes problems of errors."""
    handlers: Mapping[str, Handler] = {
        "/v1/interactions": _single(intake, INTERACTION),
        "/v1/interactions/batch": _batch(intake, INTERACTION),
        "/v1/feedback": _single(intake, FEEDBACK),
        "/v1/feedback/batch": _batch(intake, FEEDBACK),
    }
    return [Route(path, handler, methods=["POST"]) for path, handler in handlers.items()]


def _single(intake: Intake, kind: Kind[BodyT]) -> Handler:
    async def post(request: Request) -> Response:
        caller = await admitted(intake, request)
        admit_rows(intake, caller, 1)
        content = await read_json(request, MAX_BODY_BYTES)
        submission = check_one(intake, kind, content, caller, _key_of(request))
        (outcome,) = await store(intake, [submission])
        if not isinstance(outcome, Stored):
            raise outcome
        return _created(kind.name, outcome)

    return post


def _batch(intake: Intake, kind: Kind[BodyT]) -> Handler:
    async def post(request: Request) -> Response:
        caller, key = await admitted(intake, request), _key_of(request)
        items = parse_json(_BATCH, await read_json(request, MAX_BATCH_BYTES)).items
        admit_rows(intake, caller, len(items))
        admit = subject_by_row(intake, caller)
        checked = await check_items(intake, kind, list(map(bytes, items)), caller, key, admit)
        outcomes = await store(intake, checked)
        replies = [_item_reply(kind.name, i, outcome) for i, outcome in enumerate(outcomes)]
        return _json({"items": replies}, 200)

    return post


def _key_of(request: Request) -> str | None:
    """The idempotency key, or one made of the source and id of a CloudEvent in binary mode."""
    headers = request.headers
    key = headers.get("idempotency-key")
    if key is not None:
        if not re.fullmatch(KEY_PATTERN, key):
            raise InputError("Idempotency-Key must be 1 to 255 visible ASCII characters")
        return key
    source, event_id = headers.get("ce-source"), headers.get("ce-id")
    if not source or not event_id:
        return None
    return f"ce:{sha256(f'{source} {event_id}'.encode()).hexdigest()}"


def _created(name: str, stored: Stored) -> Response:
    if not stored.is_replay:
        return _json(_reply(name, stored), 201)
    return _json(_reply(name, stored), 200, (b"idempotency-replayed", b"true"))


def _reply(name: str, stored: Stored) -> dict[str, str]:
    if name == INTERACTION.name:
        return {"id": stored.id}
    return {"id": stored.id, "status": stored.status}


def _item_reply(name: str, index: int, outcome: Outcome) -> dict[str, object]:
    if isinstance(outcome, Stored):
        status = 200 if outcome.is_replay else 201
        return {"index": index, "status": status, name: _reply(name, outcome), "problem": None}
    problem = problem_of(outcome)
    shown = problem.model_dump(mode="json")
    return {"index": index, "status": problem.status, name: None, "problem": shown}


def _json(content: object, status: int, *headers: tuple[bytes, bytes]) -> Response:
    response = _Json(msgspec.json.encode(content), status)
    response.raw_headers += headers
    return response


class _Json(Response):
    """An answer in JSON, without what Starlette finds out about each."""

    def __init__(self, body: bytes, status: int) -> None:
        self.body, self.status_code, self.background = body, status, None
        size = str(len(body)).encode()
        self.raw_headers = [(b"content-type", b"application/json"), (b"content-length", size)]
