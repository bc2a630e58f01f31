"""The OpenAI-compatible HTTP face: /v1/chat/completions, /v1/models, /v1/serving.

One request is answered by the version it started with, and recorded before its answer ends. The
wire format is `wire`'s, the model `Engine`'s, the choice of version `watcher`'s, keeping answers
`recorder`'s; who a caller is, is handed in.

Mounting in another application: add `gateway.routes()` to its routes and enter
`gateway.running()` in its lifespan. `gateway.app()` is the same as an application of its own.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, ExitStack, aclosing, asynccontextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route as HttpRoute
from starlette.types import Receive, Scope, Send

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
from perennial.serving.engine import Delta, Engine, Finish, collect
from perennial.serving.recorder import RecordedAnswer, Recorder
from perennial.serving.routes import Route
from perennial.serving.watcher import LiveRoutes, RouteSource, RouteWatcher

_log = logging.getLogger(__name__)
_RETRY_AFTER_S = "1"
_T = TypeVar("_T")

Authenticate = Callable[[str | None], str]
"""Bearer token, or None when there is none → tenant. Raises AuthError or ForbiddenError."""


def anyone(_token: str | None) -> str:
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

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:  # Any: JSON
        return wire.chunk_body(
            self.id, self.call.task, self.route.version, self.created, choices
        )


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
        self._recordings: set[asyncio.Task[None]] = set()

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
        await self._tenant_of(request)
        models = [self._model_body(task) for task in self._live.tasks]
        return JSONResponse({"object": "list", "data": models})

    async def _model(self, request: Request) -> Response:
        await self._tenant_of(request)
        task = request.path_params["task"]
        if task not in self._live.tasks:
            raise NotFoundError(f"there is no model {task!r}", reason="model_not_found")
        return JSONResponse(self._model_body(task))

    def _model_body(self, task: str) -> dict[str, Any]:  # Any: JSON
        route = self._live.find(task)
        return wire.model_body(task, route.version if route else None)

    async def _tenant_of(self, request: Request) -> str:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        bearer = token.strip() if scheme.lower() == "bearer" else ""
        return await asyncio.to_thread(self._deps.authenticate, bearer or None)

    async def _chat(self, request: Request) -> Response:
        received_at, started_s = self._deps.clock(), time.monotonic()
        tenant = await self._tenant_of(request)
        call = wire.parse_chat_body(await _read_body(request, self._deps.max_body_bytes))
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
        answer = await _unless_gone(request, engine.chat(turn.call.request, turn.route.adapter))
        if answer is None:
            return _gone()
        turn.pieces.append(answer.text)
        await self._record(turn, answer.finish.reason, answer.finish)
        body = wire.completion_body(
            turn.id,
            turn.call.task,
            turn.route.version,
            turn.created,
            answer.text,
            answer.finish,
        )
        return JSONResponse(body, headers=turn.headers)

    async def _streamed(self, request: Request, turn: _Turn, stack: ExitStack) -> Response:
        events = self._events(turn)
        # The first piece is awaited here: until then a failure still has its own status.
        first = await _unless_gone(request, anext(events))
        if first is None:
            await events.aclose()
            return _gone()
        return _EventStream(first, events, stack.pop_all(), turn.headers)

    async def _events(self, turn: _Turn) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events; whatever was shown is recorded, also when cut off."""
        deltas = self._deps.engine.stream(turn.call.request, turn.route.adapter)
        reason = "cancelled"
        try:
            async with aclosing(deltas):  # type: ignore[type-var]  # engines give generators
                async for delta in deltas:
                    if delta.finish is not None:
                        reason = delta.finish.reason
                        turn.pieces.append(delta.text)
                        await self._record(turn, reason, delta.finish)
                    elif delta.text:
                        turn.pieces.append(delta.text)
                    for body in _chunks(turn, delta):
                        yield wire.event(body)
            yield wire.DONE
        except PerennialError as error:
            if not turn.pieces:
                raise
            reason = "error"
            yield wire.event(wire.error_body(error, _status_of(error).kind))
        finally:
            if reason in ("cancelled", "error") and turn.pieces:
                self._record_soon(turn, reason)

    async def _record(self, turn: _Turn, reason: str, finish: Finish | None) -> None:
        answer = _recorded(turn, reason, finish)
        task = asyncio.create_task(self._keep(answer))
        self._recordings.add(task)
        task.add_done_callback(self._recordings.discard)
        await asyncio.shield(task)  # a client that leaves now must not lose the record

    def _record_soon(self, turn: _Turn, reason: str) -> None:
        task = asyncio.create_task(self._keep(_recorded(turn, reason, None)))
        self._recordings.add(task)
        task.add_done_callback(self._recordings.discard)

    async def _keep(self, answer: RecordedAnswer) -> None:
        await asyncio.to_thread(self._deps.recorder.record, answer)
