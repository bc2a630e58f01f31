"""The HTTP API of the feedback component.

`create_app` puts routes, errors, limits and metrics around a `FeedbackStore`. A 201 is sent after
the commit, never before. The wiring chooses store and authentication, and may add routes of its
own (the gateway's), which then share the errors, request ids and metrics.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Header, Path, Query, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.types import Lifespan

from perennial.feedback.batch import to_replies, to_submissions
from perennial.feedback.keys import Authenticate, Principal, Scope
from perennial.feedback.limits import MAX_BATCH_BYTES, json_body
from perennial.feedback.metrics import Metrics, Observe
from perennial.feedback.openapi import PROBLEM_RESPONSES, describe, replayed, takes
from perennial.feedback.problems import handle_errors
from perennial.feedback.records import ID_PATTERN
from perennial.feedback.replies import (
    BatchReply,
    FeedbackCreated,
    FeedbackPage,
    FeedbackReply,
    Health,
    InteractionCreated,
    InteractionPage,
    InteractionReply,
    Problem,
)
from perennial.feedback.schemas import (
    KEY_PATTERN,
    BatchBody,
    BatchItemBody,
    FeedbackBody,
    InteractionBody,
    PageQuery,
    TaskPageQuery,
    payload_sha256,
)
from perennial.feedback.store import FeedbackStore, IdempotencyKey, Stored, StoredFeedback
from perennial.infra.clock import Clock, new_id, utc_now
from perennial.infra.errors import ForbiddenError


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiDeps:
    """What the app stands on; `lifespan` runs around it."""

    store: FeedbackStore
    authenticate: Authenticate
    clock: Clock = utc_now
    lifespan: Lifespan[FastAPI] | None = None


def create_app(deps: ApiDeps) -> FastAPI:
    """The app, ready to be served."""
    app = FastAPI(
        title="Perennial",
        version=version("perennial-llm"),
        docs_url=None,  # both pages load scripts from a CDN
        redoc_url=None,
        lifespan=deps.lifespan,
    )
    app.state.deps = deps
    app.state.metrics = Metrics()
    app.include_router(_router)
    handle_errors(app)
    describe(app, Problem, InteractionBody, FeedbackBody, BatchBody, BatchItemBody)
    app.add_middleware(Observe, metrics=app.state.metrics)
    return app


_router = APIRouter(responses=PROBLEM_RESPONSES)
_bearer = HTTPBearer(auto_error=False, description="An API key, `pnl_…`")


def _deps(request: Request) -> ApiDeps:
    deps: ApiDeps = request.app.state.deps
    return deps


def _metrics(request: Request) -> Metrics:
    metrics: Metrics = request.app.state.metrics
    return metrics


def _needs(scope: Scope) -> Callable[..., Principal]:
    def caller(
        deps: Annotated[ApiDeps, Depends(_deps)],
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    ) -> Principal:
        principal = deps.authenticate(credentials.credentials if credentials else None)
        if scope not in principal.scopes:
            raise ForbiddenError(f"this API key lacks the scope {scope}")
        return principal

    return caller


Deps = Annotated[ApiDeps, Depends(_deps)]
Counters = Annotated[Metrics, Depends(_metrics)]
Writer = Annotated[Principal, Depends(_needs(Scope.INGEST))]
Reader = Annotated[Principal, Depends(_needs(Scope.READ))]
Key = Annotated[str | None, Header(alias="Idempotency-Key", pattern=KEY_PATTERN)]
PathId = Annotated[str, Path(pattern=ID_PATTERN)]


@_router.post(
    "/v1/interactions",
    status_code=201,
    responses=replayed(InteractionCreated),
    openapi_extra=takes(InteractionBody),
)
def post_interaction(
    caller: Writer,
    body: Annotated[InteractionBody, Depends(json_body(InteractionBody))],
    deps: Deps,
    counters: Counters,
    response: Response,
    idempotency_key: Key = None,
) -> InteractionCreated:
    """Store one answered request, once; 200 with `Idempotency-Replayed: true` if it was there."""
    item = body.to_record(id=new_id("int"), tenant=caller.tenant, received_at=deps.clock())
    stored = deps.store.add_interaction(item, _key(idempotency_key, body))
    counters.count_interaction(stored)
    _mark_replay(response, stored)
    return InteractionCreated(id=stored.id)


@_router.post(
    "/v1/feedback",
    status_code=201,
    responses=replayed(FeedbackCreated),
    openapi_extra=takes(FeedbackBody),
)
def post_feedback(
    caller: Writer,
    body: Annotated[FeedbackBody, Depends(json_body(FeedbackBody))],
    deps: Deps,
    counters: Counters,
    response: Response,
    idempotency_key: Key = None,
) -> FeedbackCreated:
    """Store one signal, once per key; an unknown target makes it `pending`, not an error."""
    item = body.to_record(id=new_id("fb"), tenant=caller.tenant, received_at=deps.clock())
    stored = deps.store.add_feedback(item, _key(idempotency_key, body))
    counters.count_feedback(item.signal.kind, stored)
    _mark_replay(response, stored)
    return FeedbackCreated(id=stored.id, status=stored.status)


@_router.post("/v1/feedback/batch", openapi_extra=takes(BatchBody))
def post_feedback_batch(
    caller: Writer,
    body: Annotated[BatchBody, Depends(json_body(BatchBody, MAX_BATCH_BYTES))],
    deps: Deps,
    counters: Counters,
    idempotency_key: Key = None,
) -> BatchReply:
    """Store up to 1,000 signals in one transaction; each item has a status of its own."""
    checked = to_submissions(body, caller.tenant, idempotency_key, deps.clock())
    results = deps.store.add_feedback_batch(checked.submissions)
    for submission, result in zip(checked.submissions, results, strict=True):
        if isinstance(result, StoredFeedback):
            counters.count_feedback(submission.feedback.signal.kind, result)
    return to_replies(checked, results)


@_router.get("/v1/interactions/{id}")
def get_interaction(caller: Reader, deps: Deps, id: PathId) -> InteractionReply:
    """One interaction."""
    return InteractionReply.of(deps.store.get_interaction(caller.tenant, id))


@_router.get("/v1/feedback/{id}")
def get_feedback(caller: Reader, deps: Deps, id: PathId) -> FeedbackReply:
    """One feedback."""
    return FeedbackReply.of(deps.store.get_feedback(caller.tenant, id))


@_router.get("/v1/interactions")
def list_interactions(
    caller: Reader, deps: Deps, query: Annotated[TaskPageQuery, Query()]
) -> InteractionPage:
    """Interactions in the order they became visible."""
    page = deps.store.list_interactions(caller.tenant, query.after, query.limit, query.task)
    items = [InteractionReply.of(item) for item in page.items]
    return InteractionPage(items=items, next_after=page.next_after)


@_router.get("/v1/feedback")
def list_feedback(caller: Reader, deps: Deps, query: Annotated[PageQuery, Query()]) -> FeedbackPage:
    """Feedback in the order they became visible."""
    page = deps.store.list_feedback(caller.tenant, query.after, query.limit)
    items = [FeedbackReply.of(item) for item in page.items]
    return FeedbackPage(items=items, next_after=page.next_after)


@_router.get("/healthz")
async def healthz() -> Health:
    """The process is alive."""
    return Health()


@_router.get("/readyz")
def readyz(deps: Deps) -> Health:
    """The store can be reached; else 503."""
    deps.store.ping()
    return Health()


@_router.get("/metrics", response_class=Response, include_in_schema=False)
def metrics(counters: Counters) -> Response:
    """Prometheus text."""
    return Response(generate_latest(counters.registry), media_type=CONTENT_TYPE_LATEST)


def _key(value: str | None, body: BaseModel) -> IdempotencyKey | None:
    if value is None:
        return None
    return IdempotencyKey(value=value, payload_sha256=payload_sha256(body))


def _mark_replay(response: Response, stored: Stored | StoredFeedback) -> None:
    if stored.is_replay:
        response.status_code = 200
        response.headers["Idempotency-Replayed"] = "true"
