"""The OpenAI-compatible HTTP face: /v1/chat/completions, /v1/models, /v1/serving.

One request is answered by the version it started with, and recorded before its answer ends. The
wire format is `wire`'s, the model `Engine`'s, the choice of version `watcher`'s, keeping answers
`recorder`'s; who a caller is, is handed in.

Mounting in another application: add `gateway.routes()` to its routes and enter
`gateway.running()` in its lifespan. `gateway.app()` is the same as an application of its own.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route as HttpRoute

from perennial.infra.clock import Clock, new_id, utc_now
from perennial.infra.errors import (
    AuthError,
    ConflictError,
    ForbiddenError,
    InputError,
    NotFoundError,
    PerennialError,
    TooLargeError,
    UnavailableError,
)
from perennial.serving import wire
from perennial.serving.engine import Delta, Engine, Finish
from perennial.serving.recorder import Outcome, RecordedAnswer, Recorder
from perennial.serving.routes import Route
from perennial.serving.transport import EventStream, read_body, unless_gone
from perennial.serving.watcher import LiveRoutes, RouteSource, RouteWatcher

_ERROR_HEADERS = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": "1"}}

Authenticate = Callable[[Request], Awaitable[str]]
"""Request → tenant of its caller. Raises AuthError or ForbiddenError."""


async def anyone(_: Request) -> str:
    """The tenant of a gateway without keys, for loopback only."""
    return "default"


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayDeps:
    """What the gateway stands on; all of it is opened and closed by whoever makes it."""

    engine: Engine
    source: RouteSource
    recorder: Recorder
    tasks: Sequence[str]
    authenticate: Authenticate = anyone
    clock: Clock = utc_now
    poll_interval_s: float = 1.0
    max_body_bytes: int = 256 << 10


def create_gateway(deps: GatewayDeps) -> "Gateway":
    """A gateway that answers once `running()` is entered."""
    return Gateway(deps)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Turn:
    """One accepted request, from its first moment to its record."""

    id: str
    tenant: str
    call: wire.ChatCall
    route: Route
    received_at: datetime
    started_s: float
    pieces: list[str] = field(default_factory=list)

    @property
    def headers(self) -> dict[str, str]:
        return {
            "x-interaction-id": self.id,
            "x-model-version": self.route.version,
            "x-route-role": self.route.role,
        }

    @property
    def created(self) -> int:
        return int(self.received_at.timestamp())

    def chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:  # Any: JSON
        """The events that show `delta`; keeps its text."""
        if not self.pieces:
            yield self._chunk([wire.choice_body({"role": "assistant", "content": ""}, None)])
        self.pieces.append(delta.text)
        if delta.text:
            yield self._chunk([wire.choice_body({"content": delta.text}, None)])
        if delta.finish is not None:
            yield self._chunk([wire.choice_body({}, delta.finish.reason)])
            if self.call.has_usage_chunk:
                yield {**self._chunk([]), "usage": wire.usage_body(delta.finish)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:  # Any: JSON
        return wire.chunk_body(self.id, self.call.task, self.route.version, self.created, choices)


class Gateway:
    """The routes and the background work behind them."""

    def __init__(self, deps: GatewayDeps) -> None:
        self._deps = deps
        self._live = LiveRoutes(deps.tasks)
        self._watcher = RouteWatcher(
            source=deps.source,
            engine=deps.engine,
            live=self._live,
            clock=deps.clock,
            interval_s=deps.poll_interval_s,
        )
        self._recordings: set[asyncio.Task[Outcome]] = set()

    def routes(self) -> list[HttpRoute]:
        """For the root of a Starlette or FastAPI application."""
        return [
            HttpRoute("/v1/chat/completions", self._endpoint(self._chat), methods=["POST"]),
            HttpRoute("/v1/models", self._endpoint(self._models), methods=["GET"]),
            HttpRoute("/v1/models/{task}", self._endpoint(self._model), methods=["GET"]),
            HttpRoute("/v1/serving", self._endpoint(self._serving), methods=["GET"]),
        ]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Follow the champions meanwhile; the first look is over when the block begins."""
        await self._watcher.poll_once()
        watching = asyncio.create_task(self._watcher.run())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.gather(watching, *self._recordings, return_exceptions=True)

    def app(self) -> Starlette:
        """An application of its own, with its lifespan."""

        @asynccontextmanager
        async def lifespan(_app: Starlette) -> AsyncIterator[None]:
            async with self.running():
                yield

        return Starlette(routes=self.routes(), lifespan=lifespan)

    def health(self) -> dict[str, Any]:  # Any: JSON
        """What answers what, the engine's load and the recorder's counts, as JSON values."""
        tasks = [asdict(item) for item in self._watcher.health()]
        for item in tasks:
            since = item["failing_since"]
            item["failing_since"] = since.isoformat() if since else None
        return {
            "tasks": tasks,
            "engine": asdict(self._deps.engine.health()),
            "recorder": asdict(self._deps.recorder.health()),
        }

    def _endpoint(
        self, answer: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            try:
                return await answer(request)
            except PerennialError as error:
                return _error_response(error)
            except ClientDisconnect:
                return _gone()

        return endpoint

    async def _serving(self, _request: Request) -> Response:
        return JSONResponse(self.health())

    async def _models(self, request: Request) -> Response:
        await self._deps.authenticate(request)
        models = [self._model_body(task) for task in self._live.tasks]
        return JSONResponse({"object": "list", "data": models})

    async def _model(self, request: Request) -> Response:
        await self._deps.authenticate(request)
        task = request.path_params["task"]
        if task not in self._live.tasks:
            raise NotFoundError(f"there is no model {task!r}", reason="model_not_found")
        return JSONResponse(self._model_body(task))

    def _model_body(self, task: str) -> dict[str, Any]:  # Any: JSON
        route = self._live.find(task)
        return wire.model_body(task, route.version if route else None)

    async def _chat(self, request: Request) -> Response:
        received_at, started_s = self._deps.clock(), time.monotonic()
        tenant = await self._deps.authenticate(request)
        call = wire.parse_chat_body(await read_body(request, self._deps.max_body_bytes))
        with ExitStack() as stack:
            turn = _Turn(
                id=new_id("int"),
                tenant=tenant,
                call=call,
                route=stack.enter_context(self._live.use(call.task)),
                received_at=received_at,
                started_s=started_s,
            )
            if call.delivery == "whole":
                return await self._whole(request, turn)
            return await self._streamed(request, turn, stack)

    async def _whole(self, request: Request, turn: _Turn) -> Response:
        engine = self._deps.engine
        answer = await unless_gone(request, engine.chat(turn.call.request, turn.route.adapter))
        if answer is None:
            return _gone()
        text = wire.legible(answer.text)
        await self._record(turn, Delta(text=text, finish=answer.finish))
        body = wire.completion_body(
            turn.id,
            turn.call.task,
            turn.route.version,
            turn.created,
            text,
            answer.finish,
        )
        return JSONResponse(body, headers=turn.headers)

    async def _streamed(self, request: Request, turn: _Turn, stack: ExitStack) -> Response:
        events = self._events(turn)
        # The first piece is awaited here: until then a failure still has its own status.
        first = await unless_gone(request, anext(events))
        if first is None:
            await events.aclose()
            return _gone()
        return EventStream(first, events, stack.pop_all(), turn.headers)

    async def _events(self, turn: _Turn) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events; whatever was shown is recorded, also when cut off."""
        reason = "cancelled"
        try:
            async with aclosing(
                self._deps.engine.stream(turn.call.request, turn.route.adapter)
            ) as deltas:
                async for told in deltas:
                    delta = replace(told, text=wire.legible(told.text))
                    if delta.finish is not None:
                        reason = delta.finish.reason
                        await self._record(turn, delta)
                    for body in turn.chunks(delta):
                        yield wire.event(body)
            yield wire.DONE
        except PerennialError as error:
            if not turn.pieces:
                raise
            reason = "error"
            yield wire.event(wire.error_body(error, _status_of(error).kind))
        finally:
            if reason in ("cancelled", "error") and turn.pieces:
                self._keep(_recorded(turn, reason, None))

    async def _record(self, turn: _Turn, last: Delta) -> None:
        finish = last.finish
        assert finish is not None
        text = "".join([*turn.pieces, last.text])
        # Shielded: a client that leaves at this moment must not take the record along.
        await asyncio.shield(self._keep(_recorded(turn, finish.reason, finish, text)))

    def _keep(self, answer: RecordedAnswer) -> "asyncio.Task[Outcome]":
        task = asyncio.create_task(asyncio.to_thread(self._deps.recorder.record, answer))
        self._recordings.add(task)
        task.add_done_callback(self._recordings.discard)
        return task


class _Status(NamedTuple):
    error: type[PerennialError]
    status: int
    kind: str  # OpenAI's error type


# The first that fits; TooLargeError is an InputError and so comes before it.
_STATUSES = (
    _Status(TooLargeError, 413, "invalid_request_error"),
    _Status(InputError, 400, "invalid_request_error"),
    _Status(AuthError, 401, "authentication_error"),
    _Status(ForbiddenError, 403, "permission_error"),
    _Status(NotFoundError, 404, "invalid_request_error"),
    _Status(ConflictError, 409, "invalid_request_error"),
    _Status(UnavailableError, 503, "service_unavailable"),
    _Status(PerennialError, 500, "server_error"),
)


def _status_of(error: PerennialError) -> _Status:
    return next(entry for entry in _STATUSES if isinstance(error, entry.error))


def _error_response(error: PerennialError) -> Response:
    _, status, kind = _status_of(error)
    headers = _ERROR_HEADERS.get(status)
    return JSONResponse(wire.error_body(error, kind), status_code=status, headers=headers)


def _gone() -> Response:
    return Response(status_code=499)  # nobody is left to read it


def _recorded(
    turn: _Turn, reason: str, finish: Finish | None, text: str | None = None
) -> RecordedAnswer:
    call = turn.call
    return RecordedAnswer(
        id=turn.id,
        tenant=turn.tenant,
        task=call.task,
        messages=call.request.messages,
        completion="".join(turn.pieces) if text is None else text,
        model_version=turn.route.version,
        route_role=turn.route.role,
        subject=call.subject,
        session=call.session,
        trace_id=call.trace_id,
        num_prompt_tokens=finish.num_prompt_tokens if finish else None,
        num_completion_tokens=finish.num_completion_tokens if finish else None,
        latency_ms=round(1000 * (time.monotonic() - turn.started_s), 3),
        finish_reason=reason,
        received_at=turn.received_at,
        tags=call.tags,
    )
