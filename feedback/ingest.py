"""The routes that write: interactions and feedback, one or many at a time.

Plain Starlette and msgspec: at thousands of requests a second the framework would cost more than
the disk. Each route bounds, parses, redacts, and hands over to `committer`; the answer is sent when
the rows are on disk.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Generic, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from perennial.feedback.admission import Admission
from perennial.feedback.bodies import (
    KEY_PATTERN,
    BatchBody,
    FeedbackBody,
    FeedbackItemBody,
    InteractionBody,
    InteractionItemBody,
)
from perennial.feedback.committer import GroupCommitter
from perennial.feedback.keys import Authenticate, Principal, Scope
from perennial.feedback.limits import (
    MAX_BATCH_BYTES,
    MAX_BODY_BYTES,
    bearer_token,
    parse_json,
    read_json,
)
from perennial.feedback.metrics import Metrics
from perennial.feedback.problems import problem_of
from perennial.feedback.records import Interaction
from perennial.feedback.redact import Redact
from perennial.feedback.rows import payload_sha256
from perennial.feedback.store import Outcome, Stored, Submission
from perennial.infra.clock import Clock, new_id
from perennial.infra.errors import ForbiddenError, InputError, OverloadedError, PerennialError

Handler = Callable[[Request], Awaitable[Response]]
BodyT = TypeVar("BodyT", InteractionBody, FeedbackBody)

_ITEMS_AT_ONCE = 100  # of a batch, before other requests get their turn


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestDeps:
    """What the routes stand on."""

    committer: GroupCommitter
    authenticate: Authenticate
    admission: Admission
    redact: Redact
    clock: Clock
    metrics: Metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kind(Generic[BodyT]):
    """What differs between interactions and feedback."""

    name: str
    id_prefix: str
    body: type[BodyT]
    item: type[BodyT]


_INTERACTION = _Kind(
    name="interaction", id_prefix="int", body=InteractionBody, item=InteractionItemBody
)
_FEEDBACK = _Kind(name="feedback", id_prefix="fb", body=FeedbackBody, item=FeedbackItemBody)
_Batch = msgspec.json.Decoder(BatchBody)


def ingest_routes(deps: IngestDeps) -> list[Route]:
    """The routes, for an app that makes problems of errors."""
    handlers: Mapping[str, Handler] = {
        "/v1/interactions": _single(deps, _INTERACTION),
        "/v1/interactions/batch": _batch(deps, _INTERACTION),
        "/v1/feedback": _single(deps, _FEEDBACK),
        "/v1/feedback/batch": _batch(deps, _FEEDBACK),
    }
    return [Route(path, handler, methods=["POST"]) for path, handler in handlers.items()]


def _single(deps: IngestDeps, kind: _Kind[BodyT]) -> Handler:
    decoder = msgspec.json.Decoder(kind.body)

    async def post(request: Request) -> Response:
        caller = _admitted(deps, request)
        deps.admission.admit(_name_of(caller), 1)
        content = await read_json(request, MAX_BODY_BYTES)
        body = parse_json(decoder, content)
        submission = _submission(deps, kind, body, caller, _key_of(request), len(content))
        (outcome,) = await deps.committer.store((submission,))
        if not isinstance(outcome, Stored):
            raise outcome
        _count(deps.metrics, submission, outcome)
        return _created(kind.name, outcome)

    return post


def _batch(deps: IngestDeps, kind: _Kind[BodyT]) -> Handler:
    decoder = msgspec.json.Decoder(kind.item)

    async def post(request: Request) -> Response:
        caller, key = _admitted(deps, request), _key_of(request)
        items = parse_json(_Batch, await read_json(request, MAX_BATCH_BYTES)).items
        deps.admission.admit(_name_of(caller), len(items))
        checked: list[Submission | PerennialError] = []
        for index, item in enumerate(items):
            checked.append(_checked_item(deps, kind, decoder, bytes(item), index, caller, key))
            if index % _ITEMS_AT_ONCE == _ITEMS_AT_ONCE - 1:
                await asyncio.sleep(0)
        good = [each for each in checked if isinstance(each, Submission)]
        stored = iter(await deps.committer.store(good) if good else ())
        outcomes = [next(stored) if isinstance(c, Submission) else c for c in checked]
        for submission, outcome in zip(checked, outcomes, strict=True):
            if isinstance(submission, Submission) and isinstance(outcome, Stored):
                _count(deps.metrics, submission, outcome)
        replies = [_item_reply(kind.name, i, outcome) for i, outcome in enumerate(outcomes)]
        return _json({"items": replies}, 200)

    return post


def _admitted(deps: IngestDeps, request: Request) -> Principal:
    """The caller; refuses before the body is read what would be refused after."""
    caller = deps.authenticate(bearer_token(request))
    request.state.principal = caller
    if Scope.INGEST not in caller.scopes:
        raise ForbiddenError(f"this API key lacks the scope {Scope.INGEST}")
    if deps.committer.is_full:
        raise OverloadedError("too many writes are waiting", retry_after_s=1)
    return caller


def _checked_item(
    deps: IngestDeps,
    kind: _Kind[BodyT],
    decoder: msgspec.json.Decoder[BodyT],
    content: bytes,
    index: int,
    caller: Principal,
    batch_key: str | None,
) -> Submission | PerennialError:
    try:
        body = parse_json(decoder, content)
        key = getattr(body, "idempotency_key", None)
        if key is not None and not re.fullmatch(KEY_PATTERN, key):
            raise InputError("idempotency_key must be 1 to 255 visible ASCII characters")
        if key is None and batch_key is not None:
            # A client's key holds no space, so a derived key cannot collide with one.
            key = f"{batch_key} {index}"
        return _submission(deps, kind, body, caller, key, len(content))
    except PerennialError as error:
        return error


def _submission(
    deps: IngestDeps,
    kind: _Kind[BodyT],
    body: BodyT,
    caller: Principal,
    key: str | None,
    num_bytes: int,
) -> Submission:
    deps.admission.admit_subject(caller.tenant, body.subject)
    sent = body.to_record(id=new_id(kind.id_prefix), tenant=caller.tenant, received_at=deps.clock())
    redacted = deps.redact(sent)
    deps.metrics.count_redacted(redacted.counts)
    digest = payload_sha256(redacted.record, body.id)
    return Submission(item=redacted.record, payload_sha256=digest, key=key, num_bytes=num_bytes)


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


def _name_of(caller: Principal) -> str:
    return caller.key_id or caller.tenant


def _count(metrics: Metrics, submission: Submission, stored: Stored) -> None:
    if isinstance(submission.item, Interaction):
        metrics.count_interaction(stored)
    else:
        metrics.count_feedback(submission.item.signal.kind, stored)


def _created(name: str, stored: Stored) -> Response:
    response = _json(_reply(name, stored), 200 if stored.is_replay else 201)
    if stored.is_replay:
        response.headers["Idempotency-Replayed"] = "true"
    return response


def _reply(name: str, stored: Stored) -> dict[str, str]:
    if name == _INTERACTION.name:
        return {"id": stored.id}
    return {"id": stored.id, "status": stored.status}


def _item_reply(name: str, index: int, outcome: Outcome) -> dict[str, object]:
    if isinstance(outcome, Stored):
        status = 200 if outcome.is_replay else 201
        return {"index": index, "status": status, name: _reply(name, outcome), "problem": None}
    problem = problem_of(outcome)
    shown = problem.model_dump(mode="json")
    return {"index": index, "status": problem.status, name: None, "problem": shown}


def _json(content: object, status: int) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
