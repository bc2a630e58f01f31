"""The HTTP API of the feedback component.

`create_app` puts routes, errors, limits and metrics around a `FeedbackStore`; the routes that write
are `ingest`'s. The wiring chooses store and authentication, and may add routes of its own (the
gateway's), which then share the errors, request ids and metrics.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from perennial.feedback.access import caller_of
from perennial.feedback.admission import Admission, open_admission
from perennial.feedback.committer import GroupCommitter
from perennial.feedback.direct import Direct
from perennial.feedback.ingest import ingest_routes
from perennial.feedback.intake import Intake
from perennial.feedback.keys import Authenticate, Principal, Scope
from perennial.feedback.metrics import Metrics
from perennial.feedback.middleware import Observe
from perennial.feedback.openapi import PROBLEM_RESPONSES, describe
from perennial.feedback.problems import handle_errors
from perennial.feedback.queries import PageQuery, TaskPageQuery
from perennial.feedback.records import ID_PATTERN, MAX_NAME_CHARS
from perennial.feedback.redact import Redact, pseudonym, redact_nothing
from perennial.feedback.replies import (
    Erased,
    FeedbackPage,
    FeedbackReply,
    Health,
    InteractionPage,
    InteractionReply,
)
from perennial.feedback.store import FeedbackStore
from perennial.feedback.traces import trace_routes
from perennial.infra.clock import Clock, utc_now
from perennial.infra.errors import InputError, UnavailableError


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiDeps:
    """What the app stands on.

    `lifespan` runs around it, and `committer` is closed after it. `task` is for traces that name
    none. `allowed_hosts` are the names that a request may call us by; without any, all.
    """

    store: FeedbackStore
    committer: GroupCommitter
    authenticate: Authenticate
    admission: Admission = field(default_factory=open_admission)
    redact: Redact = redact_nothing
    metrics: Metrics = field(default_factory=Metrics)
    clock: Clock = utc_now
    task: str = "assistant"
    allowed_hosts: tuple[str, ...] = ()
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] = lambda _: nullcontext()


def create_app(deps: ApiDeps) -> FastAPI:
    """The app, ready to be served."""
    metrics = deps.metrics
    load = deps.committer.load
    metrics.watch("perennial_write_queue_rows", "Wait for a commit", lambda: load().num_rows)
    metrics.watch("perennial_write_queue_bytes", "Wait for a commit", lambda: load().num_bytes)
    intake = Intake(
        committer=deps.committer,
        authenticate=deps.authenticate,
        admission=deps.admission,
        redact=deps.redact,
        clock=deps.clock,
        metrics=metrics,
        task=deps.task,
    )
    app = _App(deps, metrics, [*ingest_routes(intake), *trace_routes(intake)])
    app.include_router(_router)
    handle_errors(app)
    describe(app)
    return app


class _App(FastAPI):
    """FastAPI behind our own middleware, which its add_middleware can only put inside its own."""

    def __init__(self, deps: ApiDeps, metrics: Metrics, writes: list[Route]) -> None:
        super().__init__(
            title="Perennial",
            version=version("perennial-llm"),
            docs_url=None,  # both pages load scripts from a CDN
            redoc_url=None,
            lifespan=partial(_lifespan, deps),
        )
        self.state.deps, self.state.metrics = deps, metrics
        self._writes, self._hosts = writes, deps.allowed_hosts
        self.router.routes += writes  # for what is not a POST, and for who lists routes

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """As Starlette does: FastAPI's own reads the environment at every request."""
        await Starlette.__call__(self, scope, receive, send)

    def build_middleware_stack(self) -> ASGIApp:
        """Ids, headers and counts around all; then the host; then the routes that write."""
        stack: ASGIApp = Direct(super().build_middleware_stack(), self._writes)
        if self._hosts:
            stack = TrustedHostMiddleware(stack, allowed_hosts=self._hosts)
        return Observe(stack, metrics=self.state.metrics)


@asynccontextmanager
async def _lifespan(deps: ApiDeps, app: FastAPI) -> AsyncIterator[None]:
    deps.committer.start()
    async with deps.lifespan(app):
        yield
    await run_in_threadpool(deps.committer.close)


_router = APIRouter(responses=PROBLEM_RESPONSES)
_bearer = HTTPBearer(auto_error=False, description="An API key, `pnl_…`")


def _deps(request: Request) -> ApiDeps:
    deps: ApiDeps = request.app.state.deps
    return deps


def _metrics(request: Request) -> Metrics:
    metrics: Metrics = request.app.state.metrics
    return metrics


def _once_each(request: Request) -> None:
    """Refuse a parameter given twice, of which one would be ignored in silence."""
    if len(request.query_params.multi_items()) > len(request.query_params):
        raise InputError("a query parameter may be given once")


def _needs(scope: Scope) -> Callable[..., Awaitable[Principal]]:
    async def caller(
        request: Request,
        deps: Annotated[ApiDeps, Depends(_deps)],
        _: Annotated[object, Depends(_bearer)],  # puts the scheme into the OpenAPI document
    ) -> Principal:
        return await caller_of(request, scope, deps.authenticate)

    return caller


Deps = Annotated[ApiDeps, Depends(_deps)]
Counters = Annotated[Metrics, Depends(_metrics)]
Reader = Annotated[Principal, Depends(_needs(Scope.READ))]
Admin = Annotated[Principal, Depends(_needs(Scope.ADMIN))]
Subject = Annotated[str, Path(min_length=1, max_length=MAX_NAME_CHARS, pattern=r"^[^\x00]*$")]
PathId = Annotated[str, Path(pattern=ID_PATTERN)]


@_router.get("/v1/interactions/{id}")
def get_interaction(caller: Reader, deps: Deps, id: PathId) -> InteractionReply:
    """One interaction."""
    return InteractionReply.of(deps.store.get_interaction(caller.tenant, id))


@_router.get("/v1/feedback/{id}")
def get_feedback(caller: Reader, deps: Deps, id: PathId) -> FeedbackReply:
    """One feedback."""
    return FeedbackReply.of(deps.store.get_feedback(caller.tenant, id))


@_router.get("/v1/interactions", dependencies=[Depends(_once_each)])
def list_interactions(
    caller: Reader, deps: Deps, query: Annotated[TaskPageQuery, Query()]
) -> InteractionPage:
    """Interactions in the order they became visible."""
    page = deps.store.list_interactions(caller.tenant, query.after, query.limit, query.task)
    items = [InteractionReply.of(item) for item in page.items]
    return InteractionPage(items=items, next_after=page.next_after)


@_router.get("/v1/feedback", dependencies=[Depends(_once_each)])
def list_feedback(caller: Reader, deps: Deps, query: Annotated[PageQuery, Query()]) -> FeedbackPage:
    """Feedback in the order they became visible."""
    page = deps.store.list_feedback(caller.tenant, query.after, query.limit)
    items = [FeedbackReply.of(item) for item in page.items]
    return FeedbackPage(items=items, next_after=page.next_after)


@_router.delete("/v1/subjects/{subject:path}")
def erase_subject(caller: Admin, deps: Deps, subject: Subject) -> Erased:
    """Empty what one end user said and was told; ids and keys stay, so that no retry revives it."""
    # Where the subject itself was redacted it was stored under its pseudonym.
    names = (subject, pseudonym(caller.tenant, subject))
    return Erased(num_rows=sum(deps.store.erase_subject(caller.tenant, name) for name in names))


@_router.get("/healthz")
async def healthz() -> Health:
    """The process is alive."""
    return Health()


@_router.get("/readyz")
def readyz(deps: Deps) -> Health:
    """The store can be reached and takes writes; else 503."""
    if not deps.committer.is_running:
        raise UnavailableError("the writer has stopped")
    deps.store.ping()
    return Health()


@_router.get("/metrics", response_class=Response, include_in_schema=False)
def metrics(counters: Counters) -> Response:
    """Prometheus text."""
    return Response(generate_latest(counters.registry), media_type=CONTENT_TYPE_LATEST)
